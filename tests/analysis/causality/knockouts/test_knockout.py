"""Attention knockout: exact, proven inside the kernel, equal under every kernel, padding and batch (T4, T5, T6)."""

import copy

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Phi3Config

from dualstream.analysis.causality.knockouts.attention_masks import blocked_edges, causal, cut_mask
from dualstream.analysis.causality.knockouts.knockout import Block, KnockoutError, knockout, knockout_support
from dualstream.modeling.families import FAMILIES, family_of

MODELS = [*FAMILIES, "llava_phi"]
ROWS = ["ttitttt", "titittttt", "tttitt", "itt"]
IMAGE = 190
NOTHING = torch.tensor([], dtype=torch.long)


@pytest.fixture(scope="module")
def eager_model(tiny_model):
    """Function family -> copy of the tiny model with eager attention."""
    copies = {}

    def get(name):
        if name not in copies:
            copies[name] = copy.deepcopy(tiny_model(name).model)
            copies[name].set_attn_implementation("eager")
        return copies[name]

    return get


@torch.no_grad()
def logits_of(model, inputs, **options):
    return model(**inputs, **options).logits


def columns(inputs, row):
    """Image columns, columns after the last image without the last, last column of one row."""
    image = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
    last = int(inputs["attention_mask"][row].nonzero().max())
    return image, torch.arange(int(image[-1]) + 1, last), torch.tensor([last])


def some_blocks(inputs, layers=None, heads=None):
    """Every row cut differently: image -> last, image -> question, among image tokens, nothing."""
    blocks = []
    for row in range(len(inputs["input_ids"])):
        image, question, last = columns(inputs, row)
        sources, destinations = ((image, last), (image[2:5], question), (image[:4], image), (image, NOTHING))[row % 4]
        blocks.append(Block(row, sources, destinations, layers, heads))
    return blocks


def reference_attention(attention, hidden, allowed, **kwargs):
    """Attention with explicit softmax over the allowed columns alone: (B, H, Q, K) bool, by a loop over queries."""
    captured = {}

    def interface(module, query, key, value, mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.zeros_like(query)
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                for q in range(query.shape[2]):
                    keep = allowed[b, h if allowed.shape[1] > 1 else 0, q].nonzero().flatten()
                    scores = (key[b, h, keep] @ query[b, h, q]) * scaling
                    out[b, h, q] = torch.softmax(scores, 0) @ value[b, h, keep]
        captured["out"] = out
        return out.transpose(1, 2), None

    return interface, captured


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_no_block_is_bit_identical_and_leaves_no_hook(name, padding, tiny_model):
    model, make = tiny_model(name)
    inputs = make(ROWS, padding=padding)
    plain = logits_of(model, inputs)
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    with knockout(model, []) as report:
        assert torch.equal(logits_of(model, inputs), plain)
    with knockout(model, [Block(0, NOTHING, torch.tensor([3]))]):
        assert torch.equal(logits_of(model, inputs), plain)
    assert report.layers == []
    with pytest.raises(RuntimeError, match="inside"), knockout(model, some_blocks(inputs)):
        raise RuntimeError("inside")
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == before
    assert torch.equal(logits_of(model, inputs), plain)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_under_sdpa_and_eager_padded_and_alone(name, padding, tiny_model, eager_model):
    """T5."""
    tiny = tiny_model(name)
    inputs = tiny.inputs(ROWS, padding=padding)
    blocks = some_blocks(inputs)
    with knockout(tiny.model, blocks) as report:
        fast = logits_of(tiny.model, inputs)
    with knockout(eager_model(name), blocks) as slow_report:
        slow = logits_of(eager_model(name), inputs)
    assert report.layers == slow_report.layers == [0, 1]
    assert report.largest_blocked_weight == slow_report.largest_blocked_weight == 0.0
    assert min(report.weight_before.values()) > 0 and report.largest_sum_error < 1e-4
    plain = logits_of(tiny.model, inputs)
    for row, block in enumerate(blocks):
        real = inputs["attention_mask"][row].bool()
        assert torch.allclose(fast[row][real], slow[row][real], atol=2e-3, rtol=1e-3)
        shift = int(real.nonzero().min())
        alone = tiny.single(inputs, row)
        moved = Block(0, block.sources - shift, block.destinations - shift)
        for model in (tiny.model, eager_model(name)):
            with knockout(model, [moved]):
                assert torch.allclose(logits_of(model, alone)[0], fast[row][real], atol=2e-3, rtol=1e-3)
        if len(block.destinations):
            assert not torch.allclose(fast[row][real], plain[row][real], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_destination_and_later_positions_change(name, tiny_model):
    """T6."""
    model, make = tiny_model(name)
    inputs = make(["tttitttttt"])
    image, question, _ = columns(inputs, 0)
    plain = logits_of(model, inputs)[0]
    destination = question[1:2]
    with knockout(model, [Block(0, image, destination)]):
        cut = logits_of(model, inputs)[0]
    first = int(destination)
    assert torch.allclose(cut[:first], plain[:first], atol=1e-5)
    assert (cut[first:] - plain[first:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_cutting_everything_but_itself_hides_the_image(name, tiny_model):
    """T4: with every route cut in all layers the last token knows nothing of the picture."""
    model, make = tiny_model(name)
    one = make(["ttitttt"])
    other = {**one, "pixel_values": torch.randn_like(one["pixel_values"])}
    image, question, last = columns(one, 0)
    everything = torch.arange(1, int(last))  # all but the first token and itself

    def last_logits(inputs, blocks):
        with knockout(model, blocks):
            return logits_of(model, inputs)[0, -1]

    def differs(blocks):
        return float((last_logits(one, blocks) - last_logits(other, blocks)).abs().max())

    assert differs([Block(0, everything, last)]) == 0.0
    assert differs([Block(0, image, torch.cat([question, last]))]) == 0.0  # the union of both routes
    assert differs([Block(0, image, last)]) > 1e-3  # through the question
    assert differs([Block(0, image, question)]) > 1e-3  # directly
    assert differs([]) > 1e-3


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_equals_softmax_over_the_remaining_columns(name, by_head, tiny_model, monkeypatch):
    """Against a loop that computes softmax over the allowed columns alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, make = tiny_model(name)
    inputs = make(["ttitt", "titt"])
    heads = (1, 3) if by_head else None
    blocks = [block for block in some_blocks(inputs, layers=(1,), heads=heads) if block.row < 2]
    attention = family_of(model).llm_blocks(model)[1].self_attn
    caught = {}

    def catch(module, args, output):
        caught["output"] = output[0]

    def remember(module, args, kwargs):
        caught.update(kwargs=kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    handles = [
        attention.register_forward_pre_hook(remember, with_kwargs=True),
        attention.register_forward_hook(catch),
    ]
    with knockout(model, blocks):
        logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    length = inputs["input_ids"].shape[1]
    allowed = causal(length, length, 0) & inputs["attention_mask"].bool()[:, None, None, :]
    allowed = allowed & ~blocked_edges(blocks, 2, 4, range(length), length)
    interface, _ = reference_attention(attention, caught["hidden"], allowed)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: interface)
    arguments = {
        key: value for key, value in caught["kwargs"].items() if key not in ("hidden_states", "attention_mask")
    }
    with torch.no_grad():
        expected = attention.forward(hidden_states=caught["hidden"], attention_mask=None, **arguments)[0]
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        assert torch.allclose(caught["output"][row][real], expected[row][real], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_heads_are_cut_alone(name, tiny_model):
    model, make = tiny_model(name)
    inputs = make(ROWS)
    with knockout(model, some_blocks(inputs, layers=(1,))) as report:
        one = logits_of(model, inputs)
    assert report.layers == [1]
    with knockout(model, some_blocks(inputs, layers=(0, 1))) as report:
        both = logits_of(model, inputs)
    assert report.layers == [0, 1]
    with knockout(model, some_blocks(inputs, layers=(1,), heads=(0, 1, 2, 3))):
        assert torch.allclose(logits_of(model, inputs), one, atol=1e-4)
    with knockout(model, some_blocks(inputs, layers=(1,), heads=(2,))):
        single = logits_of(model, inputs)
    assert not torch.allclose(one[0, -1], both[0, -1], atol=1e-4)
    assert not torch.allclose(one[0, -1], single[0, -1], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_generation_from_a_cache_equals_passes_without_one(name, tiny_model):
    model, make = tiny_model(name)
    inputs = make(ROWS)
    blocks = []
    for row in range(len(ROWS)):
        image, _, last = columns(inputs, row)
        blocks.append(Block(row, image, last, later=True))
    with knockout(model, blocks) as report:
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=4,
            suppress_tokens=[IMAGE, 191, 192, 193],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert report.largest_blocked_weight == 0.0
    longer = {**inputs, "input_ids": out.sequences}
    extra = torch.ones(len(ROWS), 4, dtype=torch.long)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], extra], 1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * extra.int()], 1)
    with knockout(model, blocks):
        whole = logits_of(model, longer)
    start = inputs["input_ids"].shape[1] - 1
    for step, logits in enumerate(out.logits):
        assert torch.allclose(logits, whole[:, start + step], atol=3e-3, rtol=1e-3)


def test_probe_catches_a_mask_of_the_wrong_kind(tiny_model, eager_model, monkeypatch):
    """D6: False written into a mask of numbers adds 0 and blocks nothing; here that fails loudly."""
    from dualstream.analysis.causality.knockouts import knockout as module

    inputs = tiny_model("llava").inputs(["ttittt"])

    def silent(mask, edges, first_query, dtype):
        return mask.masked_fill(edges, 0.0) if mask is not None else causal(*edges.shape[-2:], 0)

    monkeypatch.setattr(module, "cut_mask", silent)
    for model in (eager_model("llava"), tiny_model("llava").model):
        with pytest.raises(KnockoutError, match="did not take effect"), knockout(model, some_blocks(inputs)):
            logits_of(model, inputs)
    with knockout(tiny_model("llava").model, some_blocks(inputs), verify=False) as report:
        logits_of(tiny_model("llava").model, inputs)
    assert report.layers == []


def test_a_query_with_nothing_left_to_read_is_refused(tiny_model, eager_model):
    inputs = tiny_model("llava").inputs(["tti"])
    whole = Block(0, torch.arange(0, 3), torch.tensor([2]), keep_self=False)
    for model in (tiny_model("llava").model, eager_model("llava")):
        with pytest.raises(ValueError, match="nothing left to read"), knockout(model, [whole]):
            logits_of(model, inputs)
        with knockout(model, [Block(0, torch.arange(0, 3), torch.tensor([2]))]):  # keeps itself
            assert torch.isfinite(logits_of(model, inputs)).all()


def test_errors_name_what_does_not_exist(tiny_model):
    model, make = tiny_model("llava")
    inputs = make(["ttittt", "tt"])
    one = torch.tensor([1])
    for block, message in (
        (Block(0, one, one, layers=(5,)), "layer 5 cannot be cut"),
        (Block(0, one, one, heads=(9,)), "head 9"),
        (Block(4, one, torch.tensor([22])), "row 4"),
        (Block(1, one, torch.tensor([22])), "which is padding"),
        (Block(0, torch.tensor([99]), torch.tensor([22])), "source column 99"),
    ):
        with pytest.raises(ValueError, match=message), knockout(model, [block]):
            logits_of(model, inputs)
    with pytest.raises(ValueError, match="0 or more"):
        Block(0, torch.tensor([-1]), one)
    with pytest.raises(KnockoutError, match="no pass ever held"), knockout(model, [Block(0, one, torch.tensor([99]))]):
        logits_of(model, inputs)


def test_support_declares_limits(tiny_model, new_tiny_model):
    support = knockout_support(tiny_model("qwen2_vl").model)
    assert support.cuttable == (0, 1) and support.kernel == "sdpa" and not support.problem and not support.sliding
    assert support.to_dict()["heads"] == 4
    model = new_tiny_model("llava").model
    del family_of(model).llm_blocks(model)[0].self_attn  # as in a block of a hybrid model
    support = knockout_support(model)
    assert support.cuttable == (1,) and "no softmax attention" in support.reasons[0]
    with (
        pytest.raises(ValueError, match="layer 0 cannot be cut"),
        knockout(model, [Block(0, torch.tensor([1]), torch.tensor([2]), layers=(0,))]),
    ):
        pass
    model = new_tiny_model("llava").model
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(ValueError, match="takes no mask of edges"),
        knockout(model, [Block(0, torch.tensor([1]), torch.tensor([2]))]),
    ):
        pass


def test_sliding_windows_and_fused_projections(tiny_models):
    """A Qwen2-VL with sliding layers, and LLaVA-Phi-3 with one projection for query, key and value."""
    torch.manual_seed(0)
    sliding = tiny_models.build_tiny_model("qwen2_vl")
    config = copy.deepcopy(sliding.config)
    config.text_config.layer_types = ["full_attention", "sliding_attention"]
    config.text_config.sliding_window = 8
    config.text_config.use_sliding_window = True
    sliding = type(sliding)(config).eval()
    assert knockout_support(sliding).sliding == (1,)
    phi3 = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny_models._clip(),
            text_config=Phi3Config(**tiny_models.TEXT),
            image_token_index=IMAGE,
            image_seq_length=16,
        )
    ).eval()
    for name, model in (("qwen2_vl", sliding), ("llava", phi3)):
        inputs = tiny_models.Tiny(name, model).inputs(ROWS)
        results = []
        for kernel in ("sdpa", "eager"):
            model.set_attn_implementation(kernel)
            with knockout(model, some_blocks(inputs)) as report:
                results.append(logits_of(model, inputs))
            assert report.layers == [0, 1] and report.largest_blocked_weight == 0.0
        real = inputs["attention_mask"].bool()
        assert torch.allclose(results[0][real], results[1][real], atol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_half_precision_is_proven_too(kernel, new_tiny_model):
    tiny = new_tiny_model("qwen3_vl")
    model = tiny.model.to(torch.bfloat16)
    model.set_attn_implementation(kernel)
    inputs = {**(raw := tiny.inputs(ROWS)), "pixel_values": raw["pixel_values"].bfloat16()}
    with knockout(model, some_blocks(inputs)) as report:
        assert torch.isfinite(logits_of(model, inputs)[inputs["attention_mask"].bool()]).all()
    assert report.layers == [0, 1] and report.largest_blocked_weight == 0.0 and report.largest_sum_error < 3e-2


def test_mask_forms_are_kept():
    edges = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    edges[0, 0, 2, 1] = True
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    assert torch.equal(cut_mask(None, edges, 0, torch.float32)[0, 0], expected)
    boolean = causal(3, 3, 0)
    assert torch.equal(cut_mask(boolean, edges, 0, torch.float32)[0, 0], expected)
    lowest = torch.finfo(torch.bfloat16).min
    numbers = torch.where(boolean, 0.0, lowest).to(torch.bfloat16)
    cut = cut_mask(numbers, edges, 0, torch.bfloat16)
    assert cut.dtype == torch.bfloat16 and torch.equal(cut[0, 0] == 0, expected)
    assert torch.equal(cut_mask(None, edges[:, :, 2:], 2, torch.float32)[0, 0], expected[2:])
    with pytest.raises(ValueError, match="booleans and floating point"):
        cut_mask(boolean.int(), edges, 0, torch.float32)
    with pytest.raises(ValueError, match="attention mask has shape"):
        cut_mask(boolean[:, :, :2], edges, 0, torch.float32)
