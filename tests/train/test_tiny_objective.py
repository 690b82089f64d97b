"""The packed objective against the stock models on ordinary single conversations."""

import random

import pytest
import torch
import torch.nn.functional as F

from dualstream.data_builders.scenes import KINDS
from dualstream.train.tiny_attention import packed_masks
from dualstream.train.tiny_data import IGNORE, Packer, collate, make_sample
from dualstream.train.tiny_models import TinyModelConfig, build_model, build_processor
from dualstream.train.tiny_objective import Compression, Objective, merge_runs

SIZES = {
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_ratio": 2,
    "width": 32,
    "depth": 2,
    "mlp": 48,
}
WEIGHTS = {"answer": 1.0, "connector": 0.3, "lens": 0.3, "probe": 0.3, "named": 0.5, "compared": 0.5}
CASES = [("llava", (8, 8)), ("qwen2_vl", (8, 8)), ("qwen2_vl", (6, 9)), ("qwen2_vl", (10, 6))]


def setup(family, grid, count=3):
    torch.manual_seed(1)
    config = TinyModelConfig(family=family, **SIZES)
    processor = build_processor(config)
    model = build_model(config, processor.tokenizer).eval()
    samples = [make_sample(seed, grid, dict.fromkeys(KINDS, 1.0), 6, 0.4) for seed in range(count)]
    batch = collate(samples, grid, processor, Packer(processor))
    return model, processor, Objective(model, processor.tokenizer, WEIGHTS), samples, batch


def conversation(segment):
    messages = []
    for number, turn in enumerate(segment):
        content = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def single_labels(processor, ids, segment):
    """Answer labels found independently of the packer: search every answer's token run after its question."""
    tokenizer, labels, start = processor.tokenizer, torch.full_like(ids, IGNORE), 0
    row = ids[0].tolist()
    blank = " " if "<image>" in tokenizer.get_vocab() else ""
    for turn in segment:
        question = tokenizer(turn.text, add_special_tokens=False).input_ids
        answer = [*tokenizer(blank + turn.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        start = next(i for i in range(start, len(row)) if row[i : i + len(question)] == question) + len(question)
        start = next(i for i in range(start, len(row)) if row[i : i + len(answer)] == answer)
        labels[0, start : start + len(answer)] = torch.tensor(answer)
        start += len(answer)
    return labels


@pytest.mark.parametrize(("family", "grid"), CASES)
def test_packed_answers_equal_single_conversations(family, grid):
    model, processor, objective, samples, batch = setup(family, grid)
    packed = objective(batch).losses["answer"]
    total, count = 0.0, 0
    for sample in samples:
        for segment in sample.segments:
            text = processor.apply_chat_template(conversation(segment))
            inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
            labels = single_labels(processor, inputs.input_ids, segment)
            logits = model(**inputs).logits[0, :-1]
            total += F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum").item()
            count += int((labels != IGNORE).sum())
    assert count == int(batch.answer.sum())
    assert packed.item() == pytest.approx(total / count, abs=2e-5)


def test_several_turns_occur():
    *_, samples, _ = setup("llava", (8, 8))
    assert {len(segment) for sample in samples for segment in sample.segments} == {1, 2}


def brute_force_runs(features, words, grid):
    merged, first = features.clone(), torch.zeros(words.shape, dtype=torch.bool)
    for b in range(len(words)):
        for row in range(grid[0]):
            start = row * grid[1]
            for cell in range(start, start + grid[1]):
                if cell == start or words[b, cell] != words[b, cell - 1]:
                    end = cell
                    while end < start + grid[1] and words[b, end] == words[b, cell]:
                        end += 1
                    merged[b, cell:end] = features[b, cell:end].mean(0)
                    first[b, cell + (end - cell - 1) // 2] = True
    return merged, first


@pytest.mark.parametrize("seed", range(5))
def test_merge_runs_equals_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    grid = (3 + seed, 4)
    words = torch.randint(0, 3, (2, grid[0] * grid[1]), generator=generator)
    features = torch.randn(*words.shape, 5, generator=generator)
    merged, first = merge_runs(features, words, grid)
    expected, expected_first = brute_force_runs(features, words, grid)
    assert torch.equal(first, expected_first)
    torch.testing.assert_close(merged[first], expected[first])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_compressed_training_equals_a_shortened_prompt(family):
    """Masking merged cells out must equal removing them, every other token keeping its position."""
    model, processor, objective, samples, batch = setup(family, (8, 8), count=1)
    segment = samples[0].segments[0]
    samples[0].segments = [segment]
    batch = collate(samples, (8, 8), processor, Packer(processor))
    compressed = objective(batch, Compression()).losses["answer"]

    text = processor.apply_chat_template(conversation(segment))
    inputs = processor(images=[samples[0].image], text=[text], return_tensors="pt")
    images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    features = torch.cat(list(model.model.get_image_features(**images, return_dict=True).pooler_output)).view(
        1, 64, -1
    )
    words = F.linear(features, model.lm_head.weight).argmax(-1)
    words[0, :32] = words[0, 0]  # random weights rarely repeat a word; the plan must be the same on both sides
    merged, first = brute_force_runs(features, words, (8, 8))
    is_image = inputs.input_ids[0] == model.config.image_token_id
    keep = torch.ones_like(is_image)
    keep[is_image] = first[0]
    if family == "llava":
        positions = torch.arange(len(keep))[None][:, keep]
    else:
        positions, _ = model.model.get_rope_index(inputs.input_ids, inputs.mm_token_type_ids, inputs.image_grid_thw)
        positions = positions[:, :, keep]
    embeds = model.get_input_embeddings()(inputs.input_ids)
    embeds[0, is_image] = merged[0]
    hidden = model.model.language_model(inputs_embeds=embeds[:, keep], position_ids=positions).last_hidden_state
    labels = single_labels(processor, inputs.input_ids, segment)[:, keep]
    shortened = F.cross_entropy(model.lm_head(hidden)[0, :-1], labels[0, 1:], ignore_index=IGNORE)

    natural = F.linear(features, model.lm_head.weight).argmax(-1)
    if torch.equal(brute_force_runs(features, natural, (8, 8))[1], first):
        assert compressed.item() == pytest.approx(shortened.item(), abs=2e-5)
    else:
        forced = forced_words(objective, batch, words)
        assert forced.item() == pytest.approx(shortened.item(), abs=2e-5)


def forced_words(objective, batch, words):
    """Loss with the read-out replaced by given words: the unembedding only decides which cells merge."""
    from dualstream.train import tiny_objective

    class Fixed(torch.nn.Module):
        def forward(self, features, _words, grid):
            return merge_runs(features, words, grid)

    original = tiny_objective.merge_runs
    try:
        tiny_objective.merge_runs = Fixed()
        return objective(batch, Compression()).losses["answer"]
    finally:
        tiny_objective.merge_runs = original


def test_dropping_keeps_at_least_one_cell():
    _, _, objective, _, batch = setup("llava", (8, 8))
    with torch.no_grad():
        objective.model.lm_head.weight.zero_()
        objective.model.lm_head.weight[objective.word_ids[-1]] = 0.0
        outcome = objective(batch, Compression(drop=True))
    assert outcome.kept > 0
    assert all(torch.isfinite(value) for value in outcome.losses.values())


def test_packed_mask_rules():
    segment = torch.tensor([[0, 0, 1, 1, 2, -1]])
    masks = packed_masks(segment, torch.tensor([[False, True, False, False, False, False]]), prefix=2, block=2)
    assert masks.sizes == (2, 2, 2)
    assert masks.prefix[0, 0].int().tolist() == [[1, 0], [1, 1]]
    assert masks.blocks[0, 0].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_losses_reach_every_part():
    _, _, objective, _, batch = setup("qwen2_vl", (8, 8))
    objective(batch).losses["total"].backward()
    silent = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_samples_are_reproducible():
    a, b = (make_sample(random.Random(3).randrange(10**6), (8, 8), {"relation": 1.0}, 5) for _ in range(2))
    assert a.segments == b.segments
    assert a.image.tobytes() == b.image.tobytes()
