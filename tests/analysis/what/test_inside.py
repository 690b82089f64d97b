"""Attention, similarity and clusters: against brute force, against stock attentions, at chance without objects."""

import numpy as np
import pytest
import torch

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.analysis.what.grid_objects import objects_on_grid
from dualstream.analysis.what.inside import belonging, cluster_agreement, cosines, object_sets, pair_means
from dualstream.analysis.what.labels import make_schema
from dualstream.analysis.what.tower_attention import attention_between_tokens, seen_attention
from dualstream.analysis.what.vocabulary import make_vocabulary
from dualstream.modeling.families import family_of
from dualstream.modeling.lens import visual_features
from dualstream.processing.token_boxes import Block, TokenGeometry

SIDE = 6
GEOMETRY = TokenGeometry((SIDE * 10, SIDE * 10), (Block(SIDE, SIDE, 0.0, 0.0, 10.0, 10.0),))
VOCABULARY = make_vocabulary([" thing"], make_schema({"name": "x", "labels": {"thing": {"keywords": ["thing"]}}}))


def objects(*boxes):
    things = tuple(AnnotatedObject("thing", box) for box in boxes)
    return objects_on_grid(AnnotatedImage("a", things, lambda: None), GEOMETRY, VOCABULARY)


def test_means_over_pairs_by_brute_force():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(8, 8))
    sets = np.zeros((2, 8), bool)
    sets[0, [0, 2, 5]], sets[1, [1, 7]] = True, True
    means = pair_means(matrix, sets)
    inside = [matrix[i, j] for i in (0, 2, 5) for j in (0, 2, 5) if i != j]
    across = [matrix[i, j] for i in (0, 2, 5) for j in (1, 7)]
    assert means[0, 0] == pytest.approx(np.mean(inside)) and means[0, 1] == pytest.approx(np.mean(across))
    assert means[1, 0] == pytest.approx(np.mean([matrix[i, j] for i in (1, 7) for j in (0, 2, 5)]))
    unit = cosines(rng.normal(size=(5, 3)))
    assert np.allclose(np.diagonal(unit), 1) and unit.max() <= 1 + 1e-9


def test_copies_have_the_object_s_shape_and_touch_no_object():
    found = objects((0, 0, 20, 20), (40, 40, 60, 60), (0, 50, 10, 60), (0, 0, 60, 20))
    chosen, sets, copies = object_sets(found, GEOMETRY)
    assert chosen.tolist() == [0, 1]  # one cell is too small; the wide one lies under the first
    every = found.cells.any(0)
    for cells, moved in zip(sets, copies, strict=True):
        assert len(moved) > 0 and (moved.sum(1) == cells.sum()).all() and not (moved & every).any()
    again = object_sets(found, GEOMETRY)[2]
    assert all(np.array_equal(a, b) for a, b in zip(copies, again, strict=True))


def test_random_states_show_no_belonging_and_planted_ones_do():
    rng = np.random.default_rng(0)
    random, planted = [], []
    for number in range(40):
        left = 10 * int(rng.integers(0, 4))
        found = objects((left, 0, left + 20, 20), (left, 40, left + 20, 60))
        _, sets, copies = object_sets(found, GEOMETRY, seed=number)
        noise = rng.normal(size=(SIDE**2, 16))
        random.append(belonging(cosines(noise), sets, copies)["paired"])
        marked = noise + 3 * sets.T @ rng.normal(size=(2, 16))
        planted.append(belonging(cosines(marked), sets, copies))
    assert abs(np.mean(random)) < 3 * np.std(random) / np.sqrt(len(random))
    assert np.mean([row["paired"] for row in planted]) > 0.5
    assert np.mean([row["inside"] - row["others"] for row in planted]) > 0.5


def test_uniform_attention_is_one_and_lone_objects_have_no_others():
    found = objects((0, 0, 20, 20))
    _, sets, copies = object_sets(found, GEOMETRY)
    row = belonging(np.full((SIDE**2,) * 2, 1 / SIDE**2), sets, copies, SIDE**2)
    assert row["others"] is None
    assert all(row[name] == pytest.approx(1) for name in ("inside", "outside", "copies"))
    assert row["paired"] == pytest.approx(0)
    everywhere = belonging(np.eye(4), np.ones((1, 4), bool), [np.zeros((0, 4), bool)])
    assert everywhere == {"inside": 0.0, "outside": None, "others": None, "copies": None, "paired": None}


def test_clusters_find_planted_objects_and_not_those_of_another_picture():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    sets = object_sets(objects((0, 0, 30, 30), (30, 30, 60, 60)), GEOMETRY)[1]
    other = object_sets(objects((30, 0, 60, 30), (0, 30, 20, 60)), GEOMETRY)[1]
    states = rng.normal(size=(SIDE**2, 16)) * 0.1 + sets.T @ rng.normal(size=(2, 16)) + (~sets.any(0))[:, None]
    found, control = cluster_agreement(states, sets, other)
    assert found > 0.9 and control < 0.5
    noise = [cluster_agreement(rng.normal(size=(SIDE**2, 16)), sets, other, seed)[0] for seed in range(10)]
    assert abs(np.mean(noise)) < 0.1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_attention_seen_is_the_stock_one_and_nothing_stays(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["tit"])
    expected = visual_features(model, inputs)
    tower = family_of(model).vision_tower(model)
    before = tower.config._attn_implementation
    seen = {}
    with seen_attention(model, lambda block, weights: seen.setdefault(block, []).append(weights)):
        features = visual_features(model, inputs)
    torch.testing.assert_close(torch.cat(features), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert set(seen) == set(range(len(family_of(model).vision_blocks(model))))
    assert tower.config._attn_implementation == before
    for calls in seen.values():
        for weights in calls:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    by_token = attention_between_tokens(model, seen[0][0][0])
    assert by_token.shape == (len(expected[0]),) * 2
    whole = float(by_token.sum(-1).mean())
    assert whole <= 1 + 1e-5 and (family in ("llava", "internvl") or whole == pytest.approx(1))

    with pytest.raises(RuntimeError, match="stop"), seen_attention(model, lambda *_: None):
        raise RuntimeError("stop")
    assert tower.config._attn_implementation == before


def test_llava_attention_is_what_transformers_gives_out(new_tiny_model):
    model, make = new_tiny_model("llava")
    inputs = make(["tit"])
    seen = {}
    with seen_attention(model, lambda block, weights: seen.__setitem__(block, weights)):
        visual_features(model, inputs)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    stock = tower(inputs["pixel_values"], output_attentions=True).attentions
    for block, weights in seen.items():
        torch.testing.assert_close(weights, stock[block].mean(1).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_attention_between_tokens_by_brute_force(tiny_model, family):
    """Group the patches of each token by hand: four in a row of Qwen, a square after the class token of InternVL."""
    model, _ = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    if family == "qwen2_vl":
        weights, groups = torch.rand(24, 24, generator=generator), np.arange(24).reshape(6, 4)
    else:
        weights = torch.rand(65, 65, generator=generator)
        grid = 1 + np.arange(64).reshape(4, 2, 4, 2)
        groups = grid.transpose(0, 2, 1, 3).reshape(16, 4)
    found = attention_between_tokens(model, weights)
    for row, mine in enumerate(groups):
        for column, other in enumerate(groups):
            assert float(found[row, column]) == pytest.approx(
                float(weights[np.ix_(mine, other)].sum(1).mean()), rel=1e-5
            )


def test_windows_are_refused(tiny_model):
    with pytest.raises(ValueError, match="in windows"):
        attention_between_tokens(tiny_model("qwen2_5_vl").model, torch.eye(4))
