"""What the package's larger jobs take per image, beside a bare pass of the model over the same prepared inputs.

Every job runs as its command does it, on scenes and an embedded model; its bare pass is what cannot be done without.
All ways of a job take turns within one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dualstream.measuring import Clock, against, interleaved, timing

from .jobs import JOBS, Job, Subject, open_subject

SUITE = "overheads"
MODELS = ("tiny-llava", "tiny-qwen2-vl")
IMAGES, BATCH = 16, 8


def run(
    rounds: int,
    progress: Callable[[], Any] | None = None,
    models: Sequence[str] = MODELS,
    jobs: Iterable[str] = tuple(JOBS),
    images: int = IMAGES,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Time the jobs.

    Args:
        rounds: measured rounds, after one that is not.
        progress: called after every timed run.
        models: embedded models, Hub ids or folders.
        jobs: names of `JOBS`.
        images: scenes of a round.
        device: where the models are.

    Returns:
        One row per model, job and way: milliseconds *per image*, the ratio to the job's bare pass (``ratio_to``), and
        what the job says of the way, e.g. ``flops_ratio``.

    Raises:
        ValueError: a job is unknown, or there are fewer than two rounds.
    """
    wanted = list(jobs)
    unknown = [name for name in wanted if name not in JOBS]
    if unknown:
        raise ValueError(f"jobs={unknown[0]!r} is unknown; accepted are {', '.join(JOBS)}")
    rows: list[dict[str, Any]] = []
    for model in models:
        subject = open_subject(model, images, min(BATCH, images), device)
        for name in wanted:
            for job in JOBS[name](subject):
                rows += job_rows(subject, job, rounds, progress)
    return rows


def job_rows(
    subject: Subject, job: Job, rounds: int, progress: Callable[[], Any] | None = None
) -> list[dict[str, Any]]:
    """Time the ways of one job in turns; one row each, see ``run``."""
    seconds = interleaved(job.ways, rounds, clock=Clock(subject.model.device), progress=progress)
    return [
        {
            "suite": SUITE,
            "job": job.name,
            "model": subject.name,
            "way": way,
            "batch": subject.batch,
            "images": job.images,
            "visual_tokens": subject.visual_tokens,
            **timing(seconds[way] / job.images),
            **against(seconds[way], seconds[job.bare], job.bare),
            **job.facts.get(way, {}),
        }
        for way in job.ways
    ]
