"""Moved to ``dualstream.measuring``; this name goes when nothing imports it any more."""

from dualstream.measuring import (
    MILLISECONDS,
    WAITING,
    Clock,
    WorkCounts,
    against,
    count_work,
    interleaved,
    median_ratio,
    peak_bytes,
    timing,
)

__all__ = [
    "MILLISECONDS",
    "WAITING",
    "Clock",
    "WorkCounts",
    "against",
    "count_work",
    "interleaved",
    "median_ratio",
    "peak_bytes",
    "timing",
]
