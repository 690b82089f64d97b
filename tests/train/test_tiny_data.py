"""Training samples: cell labels from masks, and which tokens name which object."""

import random

import numpy as np
import pytest

from dualstream.data_builders.scenes import COLORS, KINDS, SHAPES, TEXTURES, make_scene, noun_phrases, rasterize
from dualstream.train.tiny_data import (
    CLUTTER_COVER,
    EMPTY_COVER,
    IGNORE,
    OBJECT_COVER,
    PLACES,
    Packer,
    cell_words,
    collate,
    compare,
    label_cells,
    make_sample,
    mentions,
    object_facts,
)
from dualstream.train.tiny_models import TinyModelConfig, build_processor


@pytest.mark.parametrize("seed", range(12))
def test_cell_labels_equal_a_per_pixel_count(seed):
    scene = make_scene(seed)
    raster = rasterize(scene, 96)
    cells = label_cells(scene, raster, (8, 8))
    best = {}
    for index, mask in enumerate(raster.masks):
        blocks = [mask[12 * (c // 8) : 12 * (c // 8) + 12, 12 * (c % 8) : 12 * (c % 8) + 12].mean() for c in range(64)]
        best[index] = int(np.argmax(blocks))
    for cell in range(64):
        window = (slice(12 * (cell // 8), 12 * (cell // 8) + 12), slice(12 * (cell % 8), 12 * (cell % 8) + 12))
        covers = [mask[window].mean() for mask in raster.masks]
        clutter = raster.clutter[window].mean()
        owner = int(np.argmax(covers))
        if max(covers) >= OBJECT_COVER or best[owner] == cell:
            item = scene.objects[owner]
            assert cell_words()[cells.word[cell]] == f" {item.shape}"
            assert list(COLORS)[cells.color[cell]] == item.color
            assert TEXTURES[cells.texture[cell]] == item.texture
        elif max(covers) > EMPTY_COVER or CLUTTER_COVER[0] < clutter < CLUTTER_COVER[1]:
            assert cells.word[cell] == IGNORE
        else:
            assert cell_words()[cells.word[cell]] == ("," if clutter >= CLUTTER_COVER[1] else ".")
        if cells.word[cell] >= len(SHAPES) or cells.word[cell] == IGNORE:
            assert cells.color[cell] == cells.texture[cell] == IGNORE


def test_every_object_is_named_somewhere():
    missing = 0
    for seed in range(200):
        scene = make_scene(seed)
        cells = label_cells(scene, rasterize(scene, 96), (8, 8))
        missing += len({SHAPES.index(item.shape) for item in scene.objects} - set(cells.word.tolist()))
    assert missing == 0


def test_mentions_point_at_the_named_object():
    from dualstream.data_builders.scenes import ask

    found = 0
    for seed in range(300):
        scene = make_scene(seed)
        names = noun_phrases(scene)
        for kind in ("relation", "where", "attribute"):
            question = ask(scene, kind, random.Random(seed))
            for last, index in mentions(question, names) if question else []:
                said = question.text[: last + 1]
                assert any(said.endswith(phrase) for phrase in names[index])
                assert all(not said.endswith(f" {phrase}") for i in names if i != index for phrase in names[i])
                found += 1
    assert found > 500


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_named_tokens_carry_their_objects_facts(family):
    processor = build_processor(TinyModelConfig(family=family))
    packer = Packer(processor)
    samples = [make_sample(seed, (8, 8), dict.fromkeys(KINDS, 1.0), 8) for seed in range(6)]
    batch = collate(samples, (8, 8), processor, packer)
    seen = 0
    for b, token in (batch.named[..., 0] != IGNORE).nonzero().tolist():
        word = processor.tokenizer.decode([int(batch.input_ids[b, token])]).strip()
        row, column, color, texture, shape = batch.named[b, token].tolist()
        scene = make_scene(b)
        (item,) = [
            o
            for o, facts in zip(scene.objects, object_facts(scene), strict=True)
            if facts.tolist() == [row, column, color, texture, shape]
        ]
        assert word in (item.shape, "object")
        assert (row, column) == (int(PLACES * item.y), int(PLACES * item.x))
        seen += 1
    assert seen > 20
    assert not (batch.answer & (batch.named[..., 0] != IGNORE)).any()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_compared_tokens_precede_answers_about_two_objects(family):
    processor = build_processor(TinyModelConfig(family=family))
    samples = [make_sample(seed, (8, 8), {"direction": 1.0}, 8, 0) for seed in range(8)]
    batch = collate(samples, (8, 8), processor, Packer(processor))
    words = {0: ("left", "right"), 1: ("above", "below")}
    seen = 0
    for b, token in (batch.compared != IGNORE).any(-1).nonzero().tolist():
        assert batch.answer[b, token + 1] and not batch.answer[b, token]
        answer = processor.tokenizer.decode([int(batch.input_ids[b, token + 1])]).strip()
        axis = 0 if answer in words[0] else 1
        assert words[axis][int(batch.compared[b, token, axis])] == answer
        seen += 1
    assert seen > 10
    assert compare(np.array([[0.2, 0.5], [0.9, 0.55]]), 0, 1).tolist() == [0, IGNORE]


def test_conversations_never_cross_blocks():
    processor = build_processor(TinyModelConfig(family="llava"))
    samples = [make_sample(seed, (8, 8), dict.fromkeys(KINDS, 1.0), 12) for seed in range(4)]
    batch = collate(samples, (8, 8), processor, Packer(processor), blocks=2)
    tail = batch.segment[:, batch.prefix :].unflatten(1, (2, batch.block))
    for row in tail:
        assert not (set(row[0].tolist()) & set(row[1].tolist()) - {-1})
