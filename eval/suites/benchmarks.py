"""What is in a suite, how a sample of each benchmark is scored, and what the papers published about it."""

from __future__ import annotations

from dataclasses import dataclass

from dualstream.eval.spatial_tasks import TASKS

FAIR, PAPER = "fair", "paper"


@dataclass(frozen=True)
class Benchmark:
    """One task of the harness.

    Attributes:
        name: as the harness knows it.
        group: benchmarks that are averaged.
        scorer: how a sample becomes a score, see ``scores``: ``fair``, ``paper``, ``exact_match``, ``pope``,
            ``mmbench``.
        unit: field of the document that names the picture: samples of one picture are not independent. Not used by
            our own tasks, whose documents name picture, pair and set.
    """

    name: str
    group: str
    scorer: str
    unit: str = ""

    @property
    def own(self) -> tuple[str, str] | None:
        """Task and protocol if it is one of ours, None for a task that comes with the harness."""
        task, _, protocol = self.name.rpartition("_")
        return (task, protocol) if self.scorer in (FAIR, PAPER) else None

    @property
    def by_likelihood(self) -> bool:
        """Whether options are compared by likelihood, which the harness does with its simple models only."""
        return self.scorer == FAIR


def _ours(group: str, prefixes: tuple[str, ...]) -> tuple[Benchmark, ...]:
    names = [name for name in TASKS if name.startswith(prefixes)]
    return tuple(Benchmark(f"{name}_{kind}", f"{group}, {kind}", kind) for kind in (FAIR, PAPER) for name in names)


SUITES: dict[str, tuple[Benchmark, ...]] = {
    "table1": (
        Benchmark("gqa", "table1", "exact_match", "imageId"),
        Benchmark("textvqa_val", "table1", "exact_match", "image_id"),
        Benchmark("mmbench_en_dev_static", "table1", "mmbench"),
        Benchmark("pope", "table1", "pope", "image_source"),
    ),
    "table2": _ours("table2", ("whatsup_", "coco_", "gqa_", "vsr_")),
    "scenes": _ours("scenes", ("scenes_",)),
}
ALL = "all"


def benchmarks_of(suite: str, tasks: str | None = None) -> list[Benchmark]:
    """The benchmarks of a suite, or those of them that are named.

    Args:
        suite: one of ``SUITES``, or ``all``.
        tasks: names with commas between them; a name without ``_fair`` or ``_paper`` stands for both.

    Raises:
        ValueError: the suite is unknown, or a name is not in it.
    """
    if suite not in (*SUITES, ALL):
        raise ValueError(f"suite {suite!r} is unknown; accepted are {', '.join((*SUITES, ALL))}")
    chosen = [b for name, group in SUITES.items() if suite in (name, ALL) for b in group]
    if tasks is None:
        return chosen
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    accepted = {name for b in chosen for name in (b.name, b.own[0] if b.own else b.name)}
    unknown = sorted(set(wanted) - accepted)
    if unknown or not wanted:
        raise ValueError(
            f"tasks {tasks!r}: {', '.join(unknown) or 'nothing'} is not in suite {suite}; accepted are "
            f"{', '.join(b.name for b in chosen)}"
        )
    return [b for b in chosen if b.name in wanted or (b.own and b.own[0] in wanted)]


@dataclass(frozen=True)
class Published:
    """A published figure, in percent."""

    model: str
    task: str
    arm: str
    value: float


_TABLE_1 = ("gqa", "textvqa_val", "mmbench_en_dev_static", "pope")
_REPORTED = {  # arXiv 2509.19191, Table 1: GQA, TextVQA, MMBench-EN, POPE, reduction rate
    ("llava-hf/llava-1.5-7b-hf", "none"): (60.50, 45.01, 53.73, 85.96, 0.0),
    ("llava-hf/llava-1.5-7b-hf", "rle"): (61.32, 43.16, 51.40, 86.00, 27.83),
    ("llava-hf/llava-1.5-7b-hf", "rle_drop_top1"): (60.14, 35.04, 47.33, 85.66, 58.35),
    ("llava-hf/llava-1.5-7b-hf", "rle_drop_top2"): (61.06, 38.53, 50.45, 85.90, 48.55),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "none"): (61.20, 78.21, 84.68, 89.23, 0.0),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "rle"): (60.80, 76.33, 84.27, 87.46, 16.19),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "rle_drop_top2"): (60.03, 74.78, 83.58, 86.83, 32.09),
}
REDUCTION = "reduction_rate"
PUBLISHED = tuple(
    Published(model, task, arm, value)
    for (model, arm), values in _REPORTED.items()
    for task, value in zip((*_TABLE_1, REDUCTION), values, strict=True)
)
PUBLISHED_NOTE = (
    "Published values are those of arXiv 2509.19191, Table 1, in percent: GQA on 1000 unseeded questions per arm, "
    "POPE without saying whether accuracy or F1 and of which split, strict reading of answers."
)


def published(model: str, task: str, arm: str) -> list[Published]:
    """Published figures of a benchmark under an arm: of this model if there are any, else of all published models.

    Args:
        model: as the user named it.
        task: as the harness names it, or ``reduction_rate``.
        arm: ``paper:METHOD`` counts as METHOD.
    """
    rows = [row for row in PUBLISHED if row.task == task and row.arm == arm.removeprefix("paper:")]
    same = [row for row in rows if row.model == model]
    return same if any(row.model == model for row in PUBLISHED) else rows
