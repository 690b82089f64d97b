import subprocess
import sys

import pytest
import torch

from dualstream.benchmarks import before_after
from dualstream.measuring import Clock


def has_revision(revision):
    command = ["git", "-C", str(before_after.ROOT), "cat-file", "-e", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_history = pytest.mark.skipif(
    not has_revision(before_after.RECORDED), reason=f"no git history with {before_after.RECORDED} here"
)


@needs_history
def test_an_older_revision_is_imported_beside_this_one_and_leaves_no_trace():
    modules = set(sys.modules)
    with before_after.older_modeling(before_after.RECORDED) as old:
        assert set(old) == set(before_after.MODULES)
        scores = old["vocabulary_scores"]
        assert scores.__name__.startswith("dualstream_before.") and not hasattr(scores, "best_tokens")
        features, weight = torch.randn(5, 8), torch.randn(20, 8)
        assert torch.equal(scores.top_k_tokens(features, weight)[0][:, 0], (features @ weight.T).argmax(1))
    assert not {name for name in set(sys.modules) - modules if name.startswith("dualstream_before")}


def test_an_unknown_revision_is_refused():
    with pytest.raises(ValueError, match="revision='no-such-revision' cannot be read"):
        before_after.older_modeling("no-such-revision").__enter__()


@needs_history
def test_every_step_gives_equal_results_and_fewer_waits(monkeypatch):
    monkeypatch.setattr(before_after, "READINGS", {"llava-1.5-7b": (40, 64)})
    monkeypatch.setattr(before_after, "GRIDS", ((4, 6),))
    rows = before_after.run(2, Clock(), whole={"tiny": torch.float32}, rows=500)
    assert {row["way"] for row in rows} == {"before", "after"}
    assert {row["kind"] for row in rows} == {"read", "plan", "pool", "rewrite", "compress", "prefill"}
    assert all(row["equal"] for row in rows)
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        assert (before["kind"], before["what"], before["batch"]) == (after["kind"], after["what"], after["batch"])
        assert after["ratio_to"] == "before" and after["ratio_low"] <= after["ratio"] <= after["ratio_high"]
        if after["kind"] in ("plan", "pool", "rewrite", "compress", "prefill"):
            assert after["waits"] <= before["waits"]
        if after["kind"] in ("plan", "compress", "prefill"):
            assert after["operations"] < before["operations"]


def test_what_differs_is_said():
    assert before_after._same([torch.tensor([1]), torch.ones(2)], [torch.tensor([1]), torch.ones(2)])
    assert not before_after._same(torch.tensor([1]), torch.tensor([2]))
    assert not before_after._same(torch.ones(2), torch.ones(3))
    assert not before_after._same(torch.ones(2), torch.ones(2) + 0.01)
