"""Run one benchmark through lmms-eval's Python interface and get every sample back, or an error.

The harness's own command ends with exit status 0 whatever happens, hides errors in five retries and writes to the
working directory. None of that is left here: results are objects, checked by ``scores``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.eval.spatial_tasks import STYLE_VARIABLE, TASKS_DIR, make_docs
from dualstream.eval.spatial_tasks.scene_tasks import COUNT_VARIABLE, scene_count

from .benchmarks import Benchmark
from .scores import add_costs, batch_seconds, check_complete, score_items

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from dualstream.eval.arms import Arm

INSTALL = "dualstream eval runs on lmms-eval: pip install 'dualstream[eval]'"
SET_SIZE = 4


def require_harness() -> None:
    """Check that lmms-eval is there.

    Raises:
        ValueError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval is not installed; {INSTALL}")


@contextlib.contextmanager
def scenes_of(limit: int | None) -> Iterator[None]:
    """Make tasks on scenes as many items long as the limit wants, in whole sets of four, for the length of a block."""
    before = os.environ.get(COUNT_VARIABLE)
    if limit is not None:
        os.environ[COUNT_VARIABLE] = str(-(-limit // SET_SIZE) * SET_SIZE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(COUNT_VARIABLE, None)
        else:
            os.environ[COUNT_VARIABLE] = before


def documents_of(benchmark: Benchmark, limit: int | None) -> int | None:
    """How many documents the first `limit` items of one of our tasks have, which also checks that its data are there.

    Returns:
        The number; for tasks of the harness the limit itself.

    Raises:
        MissingDataError: annotations or pictures are missing.
        ValueError: a file is incomplete, or a setting of the environment is not accepted.
    """
    if benchmark.own is None:
        return limit
    return len(make_docs(*benchmark.own, style=os.environ.get(STYLE_VARIABLE, "qwen"), limit=limit))


def data_settings(benchmark: Benchmark) -> dict[str, Any]:
    """What of the environment decides which documents a task has."""
    if benchmark.own is None:
        return {}
    if benchmark.name.startswith("scenes_"):
        return {"scenes": scene_count()}
    names = (STYLE_VARIABLE, "DUALSTREAM_STAND_IN_IMAGES")
    return {name: os.environ[name] for name in names if os.environ.get(name)}


class Tasks:
    """The harness's tasks: opened once, so that data are read once and missing data are found before a model runs."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        from lmms_eval.tasks import TaskManager

        _quiet()
        built_in = any(benchmark.own is None for benchmark in benchmarks)
        self._manager: TaskManager = TaskManager("ERROR", include_path=[str(TASKS_DIR)], include_defaults=built_in)
        self._opened = {benchmark.name: self._open(benchmark) for benchmark in benchmarks}

    def __getitem__(self, benchmark: Benchmark) -> Any:
        """The task object of a benchmark."""
        return self._opened[benchmark.name]

    def _open(self, benchmark: Benchmark) -> Any:
        from lmms_eval import evaluator  # noqa: F401  # registers the metrics that tasks name
        from lmms_eval.tasks import get_task_dict

        kind = "simple" if benchmark.by_likelihood else "chat"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return get_task_dict([benchmark.name], self._manager, kind)[benchmark.name]
        except (Exception, SystemExit) as error:  # of whatever kind: the data set cannot be opened
            cause = getattr(error, "last_attempt", None)
            reason = (cause.exception() if cause is not None else None) or error
            raise ValueError(f"{benchmark.name}: its data cannot be opened ({reason})") from error


class Views:
    """The harness's two views of one loaded model: one that writes answers and one that scores options.

    Args:
        **arguments: as in ``--model_args``.
    """

    def __init__(self, **arguments: Any) -> None:
        from dualstream.eval.lmms_model.model import DualStreamChat, DualStreamSimple

        self._chat: Any = DualStreamChat(**arguments)
        self._simple: Any = DualStreamSimple.sharing(self._chat)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self._chat.runner.model

    def of(self, benchmark: Benchmark, arm: Arm) -> Any:
        """The view that a benchmark needs, under an arm."""
        view = self._simple if benchmark.by_likelihood else self._chat
        view.use_arm(arm)
        return view


def run_benchmark(view: Any, task: Any, benchmark: Benchmark, documents: int | None, out: Path) -> dict[str, Any]:
    """Run one benchmark.

    Args:
        view: of ``Views``.
        task: of ``Tasks``.
        benchmark: which one.
        documents: the first how many; None: all.
        out: where the harness may write files of its own.

    Returns:
        ``items`` and ``batch_seconds`` (see ``scores``) and ``harness``, the figures it computed itself; empty in all
        but the first of several processes.

    Raises:
        IncompleteRunError: a sample came back without an answer.
    """
    from lmms_eval.evaluator import simple_evaluate

    expected = len(task.eval_docs) if documents is None else min(documents, len(task.eval_docs))
    options = Namespace(output_path=str(out), process_with_media=False)
    view.clear_records()
    with contextlib.redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=view,
            tasks=[task],
            task_manager=_NO_TASKS,
            limit=documents,
            force_simple=benchmark.by_likelihood,
            log_samples=True,
            bootstrap_iters=0,
            cli_args=options,
            process_docs_parallel=1,
        )
    records = _gathered(view.records)
    if results is None:
        return {}
    samples = results["samples"][benchmark.name]
    check_complete(benchmark, samples, expected)
    items = score_items(benchmark, samples)
    add_costs(benchmark, items, samples, records)
    return {
        "items": items,
        "batch_seconds": batch_seconds(benchmark, records),
        "harness": _figures(results["results"][benchmark.name]),
    }


_NO_TASKS: Any = object()  # stands where the harness would index all its tasks once more; objects need no index


def leave_processes() -> None:
    """Take leave of the other processes of a run, once all are done; does nothing in a run of one.

    The threads of a group that is still there when the interpreter ends abort it now and then.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _gathered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all processes."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return list(records)
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, records)
    return [record for part in found for record in part]


def _figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _quiet() -> None:
    """Keep the harness's log to errors, on stderr; importing it resets whatever was set before."""
    import lmms_eval.evaluator  # noqa: F401
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
