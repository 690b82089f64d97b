"""Which tokens a condition takes: registers by hand (T11), attention received, matched sizes, seeds (T14), windows."""

import numpy as np
import pytest
import torch

from dualstream.analysis.causality.ablations.selection import (
    attention_received,
    eager_language_model,
    object_conditions,
    ranked_conditions,
    standing_out,
)
from dualstream.analysis.causality.knockouts.routes import (
    CONTROLS,
    PAPER_ROUTES,
    PAPER_WINDOWS,
    ROUTES,
    ends_of,
    groups_of,
    windows_of,
)
from dualstream.analysis.interventions import encoded_images
from dualstream.modeling.families import FAMILIES
from dualstream.processing.token_boxes import Block, TokenGeometry

IMAGE = 190
GRID = TokenGeometry((32, 32), (Block(8, 8, 0.0, 0.0, 4, 4),))


def test_registers_are_those_above_mean_and_two_sample_deviations():
    norms = np.array([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0, 9.0, 0.2])
    mean = norms.sum() / 10
    deviation = (((norms - mean) ** 2).sum() / 9) ** 0.5
    assert standing_out(norms).tolist() == [i for i, n in enumerate(norms) if n > mean + 2 * deviation] == [8]
    assert standing_out(np.ones(5)).tolist() == [] and standing_out(np.ones(1)).tolist() == []
    assert standing_out(norms, deviations=0.0).tolist() == [8]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, "llava_phi"])
def test_attention_received_equals_the_models_own_weights(name, padding, tiny_model):
    model, make = tiny_model(name)
    inputs = make(["ttitttt", "ittttt"], padding=padding)
    with torch.no_grad():
        output = encoded_images(model, inputs)
        before = [len(module._forward_hooks) for module in model.modules()]
        received = attention_received(model, inputs, output)
        assert [len(module._forward_hooks) for module in model.modules()] == before
        with eager_language_model(model):
            weights = torch.stack(model(**inputs, output_attentions=True).attentions)  # layers, rows, heads, to, from
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    for row, found in enumerate(received):
        image = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
        last = int(inputs["attention_mask"][row].nonzero().max())
        expected = np.zeros(len(image))
        readers = range(int(image[-1]) + 1, last + 1)
        for layer in range(weights.shape[0]):
            for head in range(weights.shape[2]):
                for reader in readers:
                    expected += weights[layer, row, head, reader, image].numpy()
        expected /= weights.shape[0] * weights.shape[2] * len(readers)
        assert np.allclose(found, expected, atol=1e-5)


def test_conditions_have_their_controls_in_the_same_size():
    tokens = np.array([9, 10, 17, 18])
    found = object_conditions(GRID, tokens, "a", seed=3, draws=3, counts=(5, 20, 64))
    by_name = {}
    for condition in found:
        by_name.setdefault(condition.name, []).append(condition.tokens)
    assert [len(by_name[name][0]) for name in ("object", "object+1", "object+2", "outside", "all")] == [
        4,
        16,
        25,
        60,
        64,
    ]
    for name, size in (
        ("translated", 4),
        ("random-like-object", 4),
        ("translated+1", 16),
        ("random-like-object+1", 16),
    ):
        assert [len(own) for own in by_name[name]] == [size] * 3
        assert len({tuple(own) for own in by_name[name]}) == 3
    assert all(not set(own) & set(tokens) for name in ("translated", "translated+1") for own in by_name[name])
    assert [len(by_name[name][0]) for name in ("random-5", "random-20")] == [5, 20] and "random-64" not in by_name
    assert set(by_name["random-5"][0]) < set(by_name["random-20"][0])

    def sets(seed, name):
        return [tuple(c.tokens) for c in object_conditions(GRID, tokens, name, seed=seed, draws=3, counts=(5,))]

    assert sets(3, "a") == sets(3, "a") != sets(4, "a")
    assert sets(3, "a") != sets(3, "b")


def test_ranked_sets_are_the_first_of_the_ranking():
    ranking = np.array([5, 2, 7, 0, 1, 3, 4, 6])
    found = {c.name: c.tokens.tolist() for c in ranked_conditions("ig", ranking, {"object": 3}, (2, 8))}
    assert found == {"ig-like-object": [2, 5, 7], "ig-2": [2, 5]}


def test_groups_of_a_prompt():
    ids = torch.tensor([0, 0, 1, 7, *[IMAGE] * 64, 8, 9, 10, 11])
    mask = torch.tensor([0, 0, *[1] * 70])
    tokens = np.array([9, 10])
    groups = groups_of(ids, IMAGE, GRID, tokens, "a", mask, seed=1)
    columns = {name: own.tolist() for name, own in groups.columns.items()}
    assert columns["before"] == [2, 3] and columns["question"] == [68, 69, 70] and columns["last"] == [71]
    assert columns["visual"] == list(range(4, 68)) and columns["last-row"] == list(range(60, 68))
    assert columns["object"] == [13, 14] and len(columns["object+1"]) == 12 and len(columns["outside+1"]) == 52
    assert len(columns["random-like-question"]) == 3
    assert not set(columns["random-like-question"]) & set(columns["object+1"])
    assert len(columns["translated+1"]) == 12 and not set(columns["translated+1"]) & set(columns["object"])
    assert groups.of("question,last").tolist() == [68, 69, 70, 71]
    everything = groups_of(ids, IMAGE, GRID, np.arange(64), "a", mask)
    assert everything.of("translated+1") is None and everything.of("outside+1") is None
    with pytest.raises(ValueError, match="group='sky'"):
        groups.of("sky")
    with pytest.raises(ValueError, match="ends with the image"):
        groups_of(ids[:68], IMAGE, GRID, tokens, "a", mask[:68])
    with pytest.raises(ValueError, match="placeholders"):
        groups_of(ids[:60], IMAGE, GRID, tokens, "a", mask[:60])


def test_windows_are_the_papers_at_32_layers_and_scale():
    paper = windows_of("paper", 32)
    assert {name: (own[0], own[-1]) for name, own in paper.items()} == {**PAPER_WINDOWS, "all": (0, 31)}
    assert len(PAPER_ROUTES) * len(paper) == 36
    for layers in range(1, 81):
        for own in windows_of("paper", layers).values():
            assert own and own == tuple(range(own[0], own[-1] + 1)) and 0 <= own[0] <= own[-1] < layers
    assert windows_of("paper", 5)["late"] == (3, 4) and windows_of("paper", 64)["mid"] == tuple(range(22, 42))
    assert windows_of("width:2", 3) == {"0-1": (0, 1), "1-2": (1, 2), "all": (0, 1, 2)}
    assert list(windows_of("single", 3)) == ["0", "1", "2", "all"] and windows_of("2-4", 6) == {"2-4": (2, 3, 4)}
    for bad in ("width:9", "width:x", "4-2", "3-7", "wide"):
        with pytest.raises(ValueError, match="windows="):
            windows_of(bad, 5)


def test_routes_and_their_controls_are_known():
    assert all(ends_of(route) for route in ROUTES)
    assert set(CONTROLS) | set(CONTROLS.values()) <= set(ROUTES)
    for bad in ("object", "object->sky", "a->last"):
        with pytest.raises(ValueError, match="is unknown"):
            ends_of(bad)
