"""Turning the relation: the edits in closed form, estimates on other pairs, and what counts as a turned answer."""

import numpy as np
import pandas as pd
import pytest
import torch

from dualstream.analysis.interventions import edited_features, edited_states
from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.edits import intervention
from dualstream.analysis.where.edits.intervention import (
    CONTROLS,
    Condition,
    Intervention,
    added,
    conditions_of,
    interpolated,
)
from dualstream.analysis.where.edits.intervention_effects import findings, leads, leakage, outcomes
from dualstream.analysis.where.edits.relation_directions import (
    PairMeans,
    control_directions,
    direction,
    others,
    sites_of,
)
from dualstream.analysis.where.items import open_pairs
from dualstream.analysis.where.object_sets import background_tokens, tokens_elsewhere, touched_tokens
from dualstream.modeling import load_model

FAMILIES = ("llava", "llava_phi", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
TOKENS = {"subject": np.array([0, 2]), "reference": np.array([3])}


@pytest.fixture(scope="module")
def bench():
    model, processor = load_model("tiny-llava", device="cpu")
    return Bench(model, processor, open_pairs("scenes", 3), batch_size=12, name="tiny-llava")


def difference(states):
    return states[TOKENS["subject"]].mean(0) - states[TOKENS["reference"]].mean(0)


def test_adding_moves_the_difference_by_the_vector_and_nothing_else():
    states, vector = torch.randn(5, 8), torch.randn(8)
    new = added(vector, 1.5)(states, TOKENS)
    assert torch.allclose(difference(new) - difference(states), 1.5 * vector, atol=1e-6)
    assert torch.equal(new[[1, 4]], states[[1, 4]])
    assert torch.allclose(new[0] - new[2], states[0] - states[2], atol=1e-6)  # what differs within an object stays


def test_the_published_interpolation_in_closed_form():
    states, means = torch.randn(5, 8), torch.randn(2, 8)
    towards = interpolated(means, 0.25, towards=True)(states, TOKENS)
    assert torch.allclose(towards[2], 0.75 * states[2] + 0.25 * means[0], atol=1e-6)
    assert torch.allclose(towards[3], 0.75 * states[3] + 0.25 * means[1], atol=1e-6)
    away = interpolated(means, 0.5, towards=False)(states, TOKENS)
    assert torch.allclose(away[0], states[0] + 0.5 * (states[0] - means[0]), atol=1e-6)
    collapsed = interpolated(means, 1.0, towards=True)(states, TOKENS)
    assert torch.allclose(collapsed[0], collapsed[2])
    assert torch.equal(away[[1, 4]], states[[1, 4]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["connector", 1])
def test_edits_reach_the_objects_of_each_image_and_leave_no_trace(family, site, tiny_model):
    """The objects' difference moves by each image's own vector, seen by the next block; then all is as it was."""
    model, make = tiny_model(family)
    inputs = make(["tit", "titit"])
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    depth = 0 if site == "connector" else site
    seen = {}

    def look(kind):
        def note(states, at):
            seen[kind, at.image] = states.clone()
            return states

        return note

    def edit(states, at):
        return added(vectors[at.image], 2.0)(states, TOKENS)

    with torch.no_grad():
        before = model(**inputs).logits
        with edited_states(model, depth, look("stock")):
            model(**inputs)
        context = (
            edited_features(model, edit, deepstack=False) if site == "connector" else edited_states(model, 1, edit)
        )
        with context, edited_states(model, depth, look("edited")):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)
    for image in range(3):
        change = difference(seen["edited", image]) - difference(seen["stock", image])
        assert torch.allclose(change, 2 * vectors[image], atol=1e-4)


def made_up_pairs(count=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        PairMeans(f"p{number}", (f"a{number % 3}", f"b{number}"), torch.randn(4, 2, width, generator=generator))
        for number in range(count)
    ]


def test_a_direction_knows_nothing_of_its_own_pair_or_of_its_objects():
    pairs = made_up_pairs()
    rest = others(pairs, "p0")
    assert [each.pair_id for each in rest] == ["p1", "p2", "p4", "p5"]  # p3 has a0 in it, too
    vector = direction(rest, 1, 0)
    expected = np.mean(
        [
            (each.means[1, 0] - each.means[1, 1] - each.means[0, 0] + each.means[0, 1]).numpy()
            for each in (pairs[1], pairs[2], pairs[4], pairs[5])
        ],
        axis=0,
    )
    assert vector.numpy() == pytest.approx(expected, abs=1e-6)
    changed = [PairMeans("p0", pairs[0].kinds, 100 + pairs[0].means), *pairs[1:]]
    assert torch.equal(direction(others(changed, "p0"), 1, 0), vector)
    with pytest.raises(ValueError, match="share no object"):
        others(pairs[:2], "p0")


def test_controls_are_as_long_as_the_direction():
    rest = others(made_up_pairs(), "p0")
    wanted = direction(rest, 1, 0)
    found = control_directions(rest, 1, 0, 0, "p0")
    assert set(found) == {"random", "same_relation", "other_axis"}
    for vector in found.values():
        assert float(vector.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
    again = control_directions(rest, 1, 0, 0, "p0")
    assert all(torch.equal(found[name], again[name]) for name in found)
    across = direction(rest, 2, 3)
    cosine = torch.nn.functional.cosine_similarity(found["other_axis"], across, dim=0)
    assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-5)


def test_control_tokens_are_as_many_and_off_the_objects(bench):
    for item in bench.items:
        own, found = touched_tokens(bench, item), tokens_elsewhere(bench, item)
        taken = np.union1d(*own.values())
        assert [len(found[role]) for role in own] == [len(own[role]) for role in own]
        assert not np.intersect1d(np.union1d(*found.values()), taken).size
        assert not np.intersect1d(background_tokens(bench, item), taken).size
        for role, tokens in own.items():
            assert set(bench.tokens(item, role)) <= set(tokens)


def rows_of(site, method, dose, asked, scores, origin=0, item="x", pair="p"):
    order = -1 if method == "none" else 0
    return {
        "site": site,
        "order": order,
        "method": method,
        "dose": dose,
        "asked": asked,
        "pair_id": pair,
        "item": item,
        "axis": "horizontal",
        "origin": origin,
        "log_likelihoods": scores,
    }


def test_outcomes_on_hand_cases():
    """x: right before, turned after. y: right, pushed off its axis. z: wrong before, so it does not count."""
    frame = pd.DataFrame(
        [
            rows_of("", "none", 0.0, "own", [2.0, 0.0, -9.0, -9.0], item="x"),
            rows_of("", "none", 0.0, "own", [0.0, 3.0, -9.0, -9.0], 1, "y"),
            rows_of("", "none", 0.0, "own", [0.0, 3.0, -9.0, -9.0], 0, "z"),
            rows_of("C", "direction", 1.0, "own", [0.0, 1.0, -9.0, -9.0], item="x"),
            rows_of("C", "direction", 1.0, "own", [0.0, 3.0, 5.0, -9.0], 1, "y"),
            rows_of("C", "direction", 1.0, "own", [9.0, 0.0, -9.0, -9.0], 0, "z"),
        ]
    )
    table = outcomes(frame).set_index("item")
    assert sorted(table.index) == ["x", "y"]
    assert table.loc["x", "flip"] == 100 and table.loc["y", "flip"] == 0 and table.loc["y", "right"] == 0
    assert table.loc["x", "shift"] == pytest.approx(3.0) and table.loc["y", "shift"] == pytest.approx(0.0)
    odds = 1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(2))
    assert table.loc["x", "probability"] == pytest.approx(100 * odds, abs=0.1)


def test_leakage_on_hand_cases():
    frame = pd.DataFrame(
        [
            rows_of("", "none", 0.0, "own", [2.0, 0.0, 0.0, 0.0]),
            rows_of("", "none", 0.0, "other", [0.0, 0.0, 1.0, 2.0]),
            rows_of("C", "direction", 1.0, "own", [0.0, 3.0, 0.0, 0.0]),
            rows_of("C", "direction", 1.0, "other", [0.0, 0.0, 2.5, 2.0]),
        ]
    )
    row = leakage(frame).iloc[0]
    assert (row["own"], row["other"], row["turned"]) == (5.0, 1.5, 100.0)


def many(turned):
    """24 pairs at one site; the direction turns the share given, controls none."""
    rows = []
    for number in range(24):
        pair = f"p{number}"
        rows.append(rows_of("", "none", 0.0, "own", [2.0, 0.0, -9.0, -9.0], item=pair, pair=pair))
        rows.append(rows_of("", "none", 0.0, "other", [0.0, 0.0, 1.0, 2.0], item=pair, pair=pair))
        after = [0.0, 2.0, -9.0, -9.0] if number < turned * 24 else [2.0, 0.0, -9.0, -9.0]
        rows.append(rows_of("C", "direction", 1.0, "own", after, item=pair, pair=pair))
        rows.append(rows_of("C", "direction", 1.0, "other", [0.0, 0.0, 1.0, 2.0], item=pair, pair=pair))
        for control in CONTROLS:
            rows.append(rows_of("C", control, 1.0, "own", [2.0, 0.0, -9.0, -9.0], item=pair, pair=pair))
    return pd.DataFrame(rows)


def test_verdicts_follow_the_rule():
    assert [found.verdict for found in findings(many(1.0))] == ["yes", "yes", "yes"]
    nothing = findings(many(0.0))
    assert [found.verdict for found in nothing[:2]] == ["no", "no"]
    assert nothing[0].estimate.value == 0 and nothing[0].control.value == 0
    lead = leads(outcomes(many(0.5)), "flip", 25.0)
    assert lead["C", "random"].estimate.value == 50 and lead["C", "random"].corrected < 0.05


def test_the_experiment_resumes_to_the_same_rows(bench, tmp_path, monkeypatch):
    from dualstream.analysis.resumable_rows import ResumableRows

    site = sites_of(bench)[0]
    every = [condition for condition in conditions_of(bench) if condition.site in (None, site)]
    few = [condition for condition in every if condition.dose in (0.0, 1.0)]
    monkeypatch.setattr(intervention, "conditions_of", lambda _: few)
    experiment = Intervention()
    rows = ResumableRows(tmp_path / "rows", bench.settings())
    experiment.run(bench, rows)
    table = rows.table()
    assert table.num_rows == 12 * len(few)
    rows.path(Condition("direction", 1.0, site).unit).unlink()
    experiment.run(bench, rows)
    assert rows.table().equals(table)
    assert len(experiment.summarize(table)) == 3
    assert len(experiment.tables(table)) == 2
    assert experiment.figures(table, tmp_path)[0].stat().st_size > 10_000
