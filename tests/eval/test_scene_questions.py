"""Scoring of scene questions: known answerers get known scores."""

import pytest

from dualstream.eval.scene_questions import CONTROL, FULL, SCORED_KINDS, draw_items, format_table, normalize, summarize


def rows_for(answers: dict[str, list[str]], truth: list[str], kept: int = 30) -> list[dict]:
    return [
        {
            "seed": index,
            "kind": "presence",
            "question": "?",
            "truth": right,
            "arm": arm,
            "answer": given,
            "correct": normalize(given) == normalize(right),
            "visual_tokens": 40,
            "kept_tokens": 40 if arm in (FULL, CONTROL) else kept,
        }
        for arm, column in answers.items()
        for index, (given, right) in enumerate(zip(column, truth, strict=True))
    ]


def test_a_perfect_answerer_scores_one_and_a_constant_one_scores_chance():
    truth = ["yes", "no"] * 50
    summary = summarize(rows_for({FULL: truth, "rle": ["yes"] * 100}, truth))
    assert summary[0]["accuracy"]["value"] == 1.0
    assert summary[1]["accuracy"]["value"] == 0.5
    difference = summary[1]["difference_to_full"]
    assert difference["value"] == -0.5 and difference["low"] < -0.5 < difference["high"] < 0
    assert summary[1]["reduction_rate"]["value"] == pytest.approx(0.25)
    assert "-50.0" in format_table(summary)


@pytest.mark.parametrize("given", ["Yes", " yes. ", "YES!", "the yes"])
def test_harmless_differences_are_forgiven(given):
    assert normalize(given) == "yes"


@pytest.mark.parametrize("given", ["", "yes or no", "yesterday", "no"])
def test_other_answers_are_wrong(given):
    assert normalize(given) != "yes"


def test_items_are_deterministic_held_out_and_one_per_scene():
    from dualstream.data_builders.scenes import SPLIT_SEEDS

    items = draw_items(24, "test", seed=3, image_size=48)
    again = draw_items(24, "test", seed=3, image_size=48)
    assert [(i.seed, i.question, i.truth) for i in items] == [(i.seed, i.question, i.truth) for i in again]
    assert all(item.seed in SPLIT_SEEDS["test"] for item in items)
    assert len({item.seed for item in items}) == 24
    assert [item.kind for item in items[: len(SCORED_KINDS)]] == list(SCORED_KINDS)


def test_no_questions_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw_items(0)
