"""A run folder belongs to one run, and only finished checkpoints are continued."""

import pytest

from dualstream.train.run_folder import claim_folder, last_complete_checkpoint, mark_complete, require_one_group


def test_unfinished_checkpoints_are_removed_not_continued(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    mark_complete(tmp_path / "checkpoint-4", step=4)
    mark_complete(tmp_path / "checkpoint-8", step=8)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8", "checkpoint-of-mine"]
    assert last_complete_checkpoint(tmp_path / "checkpoint-4") is None


def test_a_folder_belongs_to_one_run(tmp_path):
    claim_folder(tmp_path / "run", {"seed": 0, "depths": (1, 2)})
    claim_folder(tmp_path / "run", {"seed": 0, "depths": (1, 2)})
    with pytest.raises(ValueError, match=r"another configuration \(seed: 0 there, 1 now\)"):
        claim_folder(tmp_path / "run", {"seed": 1, "depths": (1, 2)})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        claim_folder(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    require_one_group(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_one_group(2)
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true"):
        require_one_group(1)
