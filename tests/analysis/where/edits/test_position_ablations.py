"""Position ablations as an experiment: which arms a model has, and what is stated about them."""

import pandas as pd
import pytest

from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.edits import position_ablations
from dualstream.analysis.where.edits.position_ablations import Arm, PositionAblations, arm_effects, arms_of
from dualstream.analysis.where.items import open_pairs
from dualstream.modeling import load_model


def make_bench(name):
    model, processor = load_model(name, device="cpu")
    return Bench(model, processor, open_pairs("scenes", 2), batch_size=8, name=name)


def test_a_tower_has_the_arms_of_what_it_has():
    llava, qwen = ([arm.name for arm in arms_of(make_bench(name))] for name in ("tiny-llava", "tiny-qwen2-vl"))
    assert len(set(llava)) == len(llava) and len(set(qwen)) == len(qwen)
    assert "vision_table" in llava and not any(name.startswith("vision_rotation") for name in llava)
    assert {"vision_rotation", "vision_rotation_w", "vision_rotation-only-03"} <= set(qwen)
    assert not any(name.startswith("vision_table") for name in qwen)
    assert "vision_table-only-04" in llava and "vision_table-only-05" not in llava  # features leave before block 5
    for names in (llava, qwen):
        assert {"none", "image_zero", "image_in_place", "image_in_place-only-04", "position_ids"} <= set(names)
        assert {"tokens_global", "tokens_row", "tokens_column", "tokens_block"} <= set(names)


def test_the_blocks_of_an_arm():
    assert list(Arm("vision_table").blocks(3)) == [0, 1, 2]
    assert list(Arm("vision_table", "only", 1).blocks(3)) == [1]
    assert list(Arm("vision_table", "from", 1).blocks(3)) == [1, 2]


def made_up(spatial, presence):
    """24 pairs of one picture each; shares of right answers without the vision table."""
    rows = []
    for arm, shares in (("none", (1.0, 1.0)), ("vision_table", (spatial, presence))):
        for question, share in zip(("spatial", "presence"), shares, strict=True):
            for number in range(24):
                right = int(number < share * 24)
                row = {
                    "arm": arm,
                    "kind": arm,
                    "scope": "all",
                    "block": -1,
                    "question": question,
                    "margin": right - 0.5,
                }
                rows.append(row | {"pair_id": f"p{number}", "item": f"i{number}", "correct": right})
    return pd.DataFrame(rows)


def test_effects_and_verdicts_on_hand_cases():
    import pyarrow as pa

    frame = made_up(0.5, 1.0)
    effects = arm_effects(frame)
    assert effects["vision_table", "spatial"].estimate.value == -50
    assert effects["vision_table", "presence"].estimate.value == 0
    assert effects["vision_table", "presence"].estimate.high > 1  # no loss seen is not no loss
    assert effects["vision_table", "spatial"].corrected < 0.01
    (found,) = PositionAblations().summarize(pa.Table.from_pandas(frame))
    assert found.verdict == "yes" and found.control.value == 0
    (same,) = PositionAblations().summarize(pa.Table.from_pandas(made_up(1.0, 1.0)))
    assert same.verdict == "open" or same.estimate.low > -5


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_experiment_resumes_to_the_same_rows(name, tmp_path, monkeypatch):
    from dualstream.analysis.resumable_rows import ResumableRows

    bench = make_bench(name)
    wanted = ("none", "vision_rotation", "vision_table", "position_ids", "tokens_row", "image_zero")
    few = [arm for arm in arms_of(bench) if arm.name in wanted or arm.name.endswith(("only-00", "from-01"))]
    monkeypatch.setattr(position_ablations, "arms_of", lambda _: few)
    experiment, rows = PositionAblations(), ResumableRows(tmp_path / "rows", bench.settings())
    experiment.run(bench, rows)
    table = rows.table()
    assert table.num_rows == 2 * 8 * len(few)
    for arm in ("position_ids", "tokens_row"):
        rows.path(arm).unlink()
    experiment.run(bench, rows)
    assert rows.table().equals(table)
    lacking = "no rotary positions" if name == "tiny-llava" else "no learned position embeddings"
    assert lacking in experiment.tables(table)[0].note


def test_figures_are_drawn(tmp_path, monkeypatch):
    from dualstream.analysis.resumable_rows import ResumableRows

    bench = make_bench("tiny-llava")
    every = [arm for arm in arms_of(bench) if arm.kind in ("none", "image_in_place", "tokens_row")]
    monkeypatch.setattr(position_ablations, "arms_of", lambda _: every)
    experiment, rows = PositionAblations(), ResumableRows(tmp_path / "rows", bench.settings())
    experiment.run(bench, rows)
    assert all(path.stat().st_size > 8_000 for path in experiment.figures(rows.table(), tmp_path))
