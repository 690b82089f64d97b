"""Each peer against an independent way to its result."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_prompts import TOYS, opened

from dualstream.benchmarks.forced_map import build_decoder, forced
from dualstream.benchmarks.peers import peers_of
from dualstream.benchmarks.peers.attention import eager
from dualstream.benchmarks.peers.choices import matched
from dualstream.benchmarks.peers.inside_llm import Stream, drop_after, dropping, stages_of
from dualstream.benchmarks.peers.published import (
    made_up_tokenizer,
    published_decoder,
    published_two_passes,
    shortened_row,
)
from dualstream.benchmarks.peers.task import means, shortened, task_of
from dualstream.benchmarks.peers.vision_attention import (
    class_attention,
    dominant_and_contextual,
    received_attention,
)
from dualstream.benchmarks.prefill import feature_grids, first_token
from dualstream.eval.baselines import matched_tokens
from dualstream.modeling import RunLengthPlan, compressing
from dualstream.modeling.families import family_of
from dualstream.processing.patch_order import window_token_order

RATE = 0.45


def last_states(prefill):
    """Keys and values of the last column in every block of the language model."""
    return [torch.cat([layer.keys[:, :, -1], layer.values[:, :, -1]]) for layer in prefill.cache.layers]


# ------------------------------------------------------------------ inside the language model


@pytest.mark.parametrize("name", TOYS)
def test_a_stream_is_the_stock_model_also_when_it_drops_nothing(name):
    model, inputs = opened(name, batch=2, images=2, ragged=True)
    task, stock = task_of(model, inputs, RATE), first_token(model, inputs)
    stream = Stream(task, task.encoded())
    stream.run(1)
    scores = stream.run_scoring()
    stream.drop(scores, stream.visual)
    stream.run(4)
    assert torch.equal(stream.first_token(), stock.first_token)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(stream.cache.layers, stock.cache.layers, strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eager_scores", [False, True])
@pytest.mark.parametrize("name", TOYS)
def test_dropping_is_not_being_seen_by_later_blocks(name, eager_scores):
    """Reference: the whole prompt through stock blocks, the later ones with dropped columns masked for everyone."""
    model, inputs = opened(name, batch=2, ragged=True)
    task, text = task_of(model, inputs, RATE), family_of(model).language_model(model)
    visual = inputs["input_ids"] == task.placeholder
    model.set_attn_implementation("eager")
    full = 1 if name == "tiny-qwen3-vl" else 2  # deepstack features of that one are still to be added after one
    attention = model(**inputs, output_attentions=True).attentions[full - 1].mean(1)[:, -1]
    model.set_attn_implementation("sdpa")
    best = [row[mask].topk(task.keep).indices for row, mask in zip(attention, visual, strict=True)]
    dropped = visual.clone()
    for row, kept in enumerate(best):
        dropped[row, visual[row].nonzero().flatten()[kept]] = False
    length = visual.shape[1]
    seen = (inputs["attention_mask"].bool() & ~dropped)[:, None] & torch.ones(length, length).tril().bool()
    seen = seen | torch.eye(length, dtype=torch.bool)  # rows that see nothing are not looked at

    def blind(_, args, kwargs):
        return args, {**kwargs, "attention_mask": seen[:, None]}

    handles = [block.register_forward_pre_hook(blind, with_kwargs=True) for block in text.layers[full:]]
    reference = first_token(model, inputs)
    for handle in handles:
        handle.remove()
    found = drop_after(task, full, eager_scores)()
    assert torch.equal(found.input_ids, _without(inputs["input_ids"], dropped))
    assert torch.equal(found.first_token, reference.first_token)
    for one, other in zip(last_states(found), last_states(reference), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def _without(ids, dropped):
    return torch.stack([row[~gone] for row, gone in zip(ids, dropped, strict=True)])


def test_dropping_matters_to_the_values_that_are_compared():
    model, inputs = opened("tiny")
    task = task_of(model, inputs, RATE)
    least, most = dropping(task, {2: task.keep}, False)(), dropping(task, {2: task.cells - 1}, False)()
    assert (last_states(least)[-1] - last_states(most)[-1]).abs().max() > 1e-2


@given(st.integers(4, 40), st.integers(1, 64), st.floats(0.3, 1.0))
def test_stages_spend_the_budget_on_average(blocks, sixteenths, share):
    whole = 16 * sixteenths
    keep = max(1, round(whole * share))
    try:
        stages = stages_of(blocks, whole, keep)
    except ValueError:
        assert keep / whole <= (blocks // 4) / blocks
        return
    seen = [whole] * blocks
    for border, kept in stages.items():
        seen[border:] = [kept] * (blocks - border)
    assert sum(seen) / blocks == pytest.approx(keep, abs=1.01)
    assert seen == sorted(seen, reverse=True)


# ------------------------------------------------------------------ at the end of the vision tower


@pytest.mark.parametrize("whole_tower_eager", [False, True])
def test_class_attention_is_that_of_an_eager_tower(whole_tower_eager):
    model, inputs = opened("tiny", batch=2)
    task = task_of(model, inputs, RATE)
    with torch.no_grad():
        output, scores, keys = class_attention(task, whole_tower_eager)
    model.set_attn_implementation("eager")
    pictures = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    brute = pictures.attentions[-2][:, :, 0, 1:].sum(1)  # the block whose output is the hidden state -2
    torch.testing.assert_close(scores, brute)
    assert [set(row.tolist()) for row in scores.topk(task.keep).indices] == [
        set(row.tolist()) for row in brute.topk(task.keep).indices
    ]
    torch.testing.assert_close(
        torch.stack(list(output.pooler_output)), model.model.multi_modal_projector(pictures.hidden_states[-2][:, 1:])
    )
    block = family_of(model).vision_blocks(model)[-2]
    key = block.self_attn.k_proj(block.layer_norm1(pictures.hidden_states[-3]))[:, 1:]
    torch.testing.assert_close(keys, key.unflatten(-1, (4, -1)).mean(2))


def test_class_attention_of_tiles_counts_squares_of_patches():
    model, inputs = opened("tiny-internvl")
    task = task_of(model, inputs, RATE)
    with torch.no_grad():
        _, scores, _ = class_attention(task)
        tower = model.model.vision_tower
        model.set_attn_implementation("eager")
        weights = tower(inputs["pixel_values"], output_attentions=True).attentions[-1][0, :, 0, 1:].sum(0)
    side = task.height * 2
    for row, column in ((0, 0), (3, 5), (task.height - 1, task.width - 1)):
        patches = [(2 * row + down) * side + 2 * column + right for down in (0, 1) for right in (0, 1)]
        assert scores[0, row * task.width + column] == pytest.approx(weights[patches].mean().item(), rel=1e-4)


@pytest.mark.parametrize("whole_tower_eager", [False, True])
@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_received_attention_is_that_of_an_eager_tower(name, whole_tower_eager, monkeypatch):
    model, inputs = opened(name, batch=2)
    task = task_of(model, inputs, RATE)
    with torch.no_grad():
        output, scores, _ = received_attention(task, whole_tower_eager)
    tower, weights = model.model.visual, []
    library = sys.modules[type(tower).__module__]
    stock = library.eager_attention_forward

    def recording(*args, **kwargs):
        found = stock(*args, **kwargs)
        weights.append(found[1])
        return found

    monkeypatch.setattr(library, "eager_attention_forward", recording)
    with torch.no_grad(), eager([tower.blocks[-1].attn]):  # the last block sees whole pictures in all three
        again = task.encoded()
    assert len(weights) == 2 and len(weights[0]) == 1  # one call per picture
    for picture, given_out in enumerate(weights):
        received = given_out[0].mean((0, 1)).view(-1, 4).mean(1)
        raster = torch.empty_like(received)
        order = np.arange(task.cells)
        if name == "tiny-qwen2.5-vl":
            order = window_token_order(task.height, task.width)
            assert (order != np.arange(task.cells)).any()
        raster[torch.from_numpy(order)] = received
        torch.testing.assert_close(scores[picture], raster)
    for one, other in zip(output.pooler_output, again.pooler_output, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@given(st.integers(2, 40), st.integers(0, 1000), st.data())
@settings(deadline=None)
def test_contextual_tokens_gather_what_is_alike(cells, seed, data):
    keep = data.draw(st.integers(1, cells - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, cells, generator=generator)
    keys = torch.randn(2, cells, 5, generator=generator)
    anchor, group = dominant_and_contextual(scores, keys, keep)
    for block in range(2):
        number = max(1, round(keep * 10 / 64))
        dominant = np.argsort(-scores[block].numpy())[: keep - number].tolist()
        rest = [cell for cell in range(cells) if cell not in dominant]
        targets = rest[:: len(rest) // number][:number]
        kept = sorted(dominant + targets)
        assert anchor[block].tolist() == kept
        for cell in range(cells):
            home = cell
            if cell not in kept:
                alike = [torch.cosine_similarity(keys[block, cell], keys[block, one], dim=0) for one in targets]
                home = targets[int(torch.stack(alike).argmax())]
            assert kept[group[block, cell]] == home


def test_nothing_to_choose():
    anchor, group = dominant_and_contextual(torch.rand(2, 6), torch.rand(2, 6, 3), 6)
    assert anchor.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and group is None


# ------------------------------------------------------------------ merging


@given(st.integers(1, 60), st.integers(0, 1000), st.data())
@settings(deadline=None)
def test_matching_on_the_device_is_that_of_the_baselines(cells, seed, data):
    keep = data.draw(st.integers(1, cells))
    features = torch.randn(2, cells, 6, generator=torch.Generator().manual_seed(seed))
    anchor, group = matched(features, keep)
    for block in range(2):
        reference = matched_tokens(features[block].numpy(), 1, cells, keep, np.random.default_rng(0))
        assert group[block].tolist() == reference.tolist()
        assert anchor[block].tolist() == sorted(set(anchor[block].tolist())) and len(anchor[block]) == keep
        assert group[block, anchor[block]].tolist() == list(range(keep))  # a token stands at one of its own cells
    pooled = means(features, group, keep)
    by_hand = torch.stack([features[0, group[0] == token].mean(0) for token in range(keep)])
    torch.testing.assert_close(pooled[0], by_hand)


@pytest.mark.parametrize("peer", ["token matching", "vision attention"])
@pytest.mark.parametrize("name", TOYS)
def test_merged_tokens_enter_as_a_plan_of_the_product_would(name, peer):
    model, inputs = opened(name, batch=2, images=2, ragged=True)
    task = task_of(model, inputs, 0.6)
    with torch.no_grad():
        if peer == "token matching":
            anchor, group = matched(task.blockwise(task.encoded().pooler_output), task.keep)
        else:
            score = class_attention if name in ("tiny", "tiny-internvl") else received_attention
            anchor, group = dominant_and_contextual(*score(task)[1:], task.keep)
    block = torch.arange(task.blocks)[:, None]
    segment, anchor = (group + block * task.keep).flatten(), (anchor + block * task.cells).flatten()
    plan = RunLengthPlan(segment, anchor, torch.tensor([task.keep] * task.blocks), segment)
    with compressing(model, "rle", decoder=build_decoder("pruned", model), planner=lambda images: plan):
        reference = first_token(model, inputs)
    found = peers_of(model, inputs, 0.6, (), [peer])[peer]()
    assert torch.equal(found.first_token, reference.first_token) and found.length == reference.length
    for one, other in zip(last_states(found), last_states(reference), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl"])
def test_decoding_can_go_on_from_what_a_peer_returns(name):
    model, inputs = opened(name, batch=2, ragged=True)
    task = task_of(model, inputs, RATE)
    found = peers_of(model, inputs, RATE, (), ["strided cells"])["strided cells"]()
    cells = (2 * torch.arange(task.keep) + 1) * task.cells // (2 * task.keep)
    with torch.no_grad():
        short, features = shortened(task, task.encoded(), cells.expand(2, -1), None)
    token = found.first_token[:, None]
    after = found.position_ids.amax(-1)
    after = (after.amax(0, keepdim=True).expand_as(after) if after.ndim == 2 else after)[..., None] + 1
    mask = torch.cat([found.attention_mask, torch.ones_like(token)], 1)
    longer = {**short, "input_ids": torch.cat([short["input_ids"], token], 1), "attention_mask": mask}
    longer["position_ids"] = torch.cat([short["position_ids"], after], -1)
    longer.pop("mm_token_type_ids", None)
    with torch.no_grad():
        step = model(input_ids=token, past_key_values=found.cache, attention_mask=mask, position_ids=after)
        whole = model(**longer, mm_encoder_outputs={"image": features}, logits_to_keep=1)
    torch.testing.assert_close(step.logits, whole.logits, atol=2e-3, rtol=2e-3)


# ------------------------------------------------------------------ the published way


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, vocab_size):
        self.tokenizer, self.calls = made_up_tokenizer(vocab_size), 0

    def decode(self, token):
        self.calls += 1
        return self.tokenizer.decode(token)


@pytest.mark.parametrize("name", TOYS)
def test_the_published_way_is_ours_with_compact_positions(name):
    model, inputs = opened(name, batch=2, images=2, ragged=True)
    task, decoder = task_of(model, inputs, RATE), build_decoder("linear", model)
    tokenizer = Counting(2048)
    reader = forced(decoder, feature_grids(model, inputs), RATE)
    with compressing(model, "rle", decoder=reader, position_policy="compact"):
        ours = first_token(model, inputs)
    readings = 2 if name == "tiny" else 3
    for way in (
        published_two_passes(task, tokenizer),
        published_decoder(task, decoder.own_parameter, tokenizer),
    ):
        tokenizer.calls = 0
        theirs = way()
        assert tokenizer.calls == readings * task.blocks * task.cells
        assert torch.equal(theirs.first_token, ours.first_token) and theirs.length == ours.length
        for one, other in zip(last_states(theirs), last_states(ours), strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_made_up_words_differ_and_decode():
    tokenizer = made_up_tokenizer(50)
    words = [tokenizer.decode(token) for token in range(50)]
    assert len(set(words)) == 50 and words[7] == " word7"


def test_runs_of_strings_by_hand():
    ids = torch.tensor([5, 9, 9, 9, 5, 9, 9, 5])  # 9 stands for a visual token
    columns, runs = shortened_row(ids, 9, ["a", "a", "b", "b", "c"])
    assert columns == [0, 1, 3, 4, 6, 7]  # the run of b goes on behind the text, as runs of the public code do
    assert runs == [slice(0, 2), slice(2, 4), slice(4, 5)]
