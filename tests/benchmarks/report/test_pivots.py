"""Rows side by side: every figure in its own cell, kinds of rows in tables of their own."""

import pytest

from dualstream.benchmarks.report.pivots import (
    batch_table,
    change_table,
    details,
    kind_tables,
    peer_table,
    stage_tables,
)


def test_stages_are_rows_and_ways_are_columns(make_record, by_hand):
    table = stage_tables(make_record(by_hand.stages(prefill=400.0)))
    assert "Batch 1, 49 % fewer; median ms [quartiles], share of the way:" in table
    assert "| stage | uncompressed | native short | compressed, pruned |" in table
    assert "| prefill | 400 [360, 440], 50.0 % | 200 [180, 220], 50.0 % | 200 [180, 220], 50.0 % |" in table
    assert "| by itself | plan | 0.500 [0.450, 0.550] |" in table


def test_batches_by_budget(make_record):
    same = {"suite": "memory", "kind": "largest batch", "prefill": "p", "ratio_to": "uncompressed"}
    names = ("way", "reduction", "budget_gib", "batch", "ratio", "kept_tokens")
    rows = [
        {**same, **dict(zip(names, values, strict=True)), "kv_bytes": values[-1] * 2**20}
        for values in (
            ("uncompressed", 0.0, 24.0, 0, None, 576),
            ("uncompressed", 0.0, 80.0, 40, 1.0, 576),
            ("compressed, pruned", 0.49, 24.0, 3, None, 294),
            ("compressed, pruned", 0.49, 80.0, 70, 1.75, 294),
        )
    ]
    table = batch_table(make_record(rows))
    head = "| way | fewer visual tokens % | kept | keys and values of a row | 24 GiB, p | 80 GiB, p |"
    assert head in table
    assert "| uncompressed | 0 | 576 | 576.00 MiB | 0 | 40 (1.00 x) |" in table
    assert "| compressed, pruned | 49 | 294 | 294.00 MiB | 3 | 70 (1.75 x) |" in table


def test_memory_without_batches_has_its_other_rows(make_record):
    found = details(make_record([{"suite": "memory", "kind": "check", "way": "a", "error": -0.02}]), "memory")
    assert found.startswith("Check:")
    assert "| a | -2.00 |" in found and "Largest batch" not in found


def test_kinds_have_tables_of_their_own_and_long_ones_are_folded():
    rows = [{"kind": "point", "way": f"w{n}", "x": n} for n in range(3)] + [{"kind": "fit", "way": "w", "slope": 2.5}]
    points, fit = kind_tables(rows, longest=2)
    assert points.startswith("<details><summary>Point: 3 rows</summary>") and "slope" not in points
    assert fit.startswith("Fit:\n\n| way | slope |")
    assert kind_tables(rows)[0].startswith("Point:\n\n| way | x |")
    assert kind_tables([{"way": "a", "x": 1}]) == ["| way | x |\n| --- | --- |\n| a | 1 |"]


def test_peers_of_a_cut_model_say_what_the_whole_one_would_take(make_record, by_hand):
    found = {"ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5, "ratio_to": "native short"}
    whole = {"full_depth_ms": 70.0, "full_depth_ratio": {"value": 1.125, "low": 1.0, "high": 1.25}}
    rows = [by_hand.time("peers", "a", 10.0, **found, **whole), by_hand.time("peers", "b", 10.0, **found)]
    table = peer_table(make_record(rows))
    assert "behind the arrow those of the whole model" in table
    assert "| a |  |  |  | 10.0, 1.250 [1.000, 1.500] → 70.0, 1.125 [1.000, 1.250] |" in table
    assert "| b |  |  |  | 10.0, 1.250 [1.000, 1.500] |" in table
    assert "arrow" not in peer_table(make_record(rows[1:]))


def test_steps_before_and_after_stand_in_one_line(make_record, by_hand):
    same = {"kind": "plan", "what": "a grid", "batch": 8, "equal": True}
    found = {"ratio": 0.25, "ratio_low": 0.2, "ratio_high": 0.3, "ratio_to": "before"}
    rows = [
        by_hand.time("before_after", "before", 8.0, operations=80, waits=7, peak_bytes=2**21, **same),
        by_hand.time("before_after", "after", 2.0, operations=60, waits=2, peak_bytes=2**20, **same, **found),
    ]
    table = change_table(make_record(rows))
    assert (
        "| plan | a grid | 8 | 576 | 8.00 [7.20, 8.80] | 2.00 [1.80, 2.20] | 0.250 [0.200, 0.300] | 80 → 60 | 7 → 2 | "
        "2.00 MiB → 1.00 MiB | yes |"
    ) in table
    assert table in details(make_record(rows * 2), "before_after")
    for odd in (rows[1:], [{**rows[0], "what": "another"}, rows[1]]):
        with pytest.raises(ValueError, match="step 'a grid' has no row `before` in front of it"):
            change_table(make_record(odd))


def test_curves_are_explained_in_words(make_record):
    rows = [{"suite": "growth", "kind": "fit", "curve": "batch", "way": "a", "slope": 2.5, "explanation": "It grows."}]
    found = details(make_record(rows), "growth")
    assert (
        found
        == "- **batch**, a: It grows.\n\nFit:\n\n| curve | way | slope |\n| --- | --- | --- |\n| batch | a | 2.50 |"
    )


def test_a_share_of_reading_is_that_of_a_decoder(make_record):
    row = {
        "suite": "growth",
        "kind": "share at full depth",
        "curve": "depth",
        "decoder": "pruned",
        "explanation": "1 %.",
    }
    assert details(make_record([row]), "growth").startswith("- **depth**, pruned: 1 %.")
