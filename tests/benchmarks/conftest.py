"""Records made by hand, with numbers that can be followed by eye."""

from dataclasses import replace

import pytest

from dualstream.benchmarks.records import Record

SHAPE = {
    "name": "llava-1.5-7b",
    "layers": 4,
    "full_layers": 32,
    "vision_layers": 24,
    "full_vision_layers": 24,
    "hidden_size": 4096,
    "vocab_size": 32064,
    "parameters": 1_500_000_000,
    "dtype": "bfloat16",
    "device": "cpu",
    "image_size": [336, 336],
    "is_toy": False,
    "is_reduced": True,
}
MACHINE = {
    "system": "Linux x86_64",
    "cpu": "A processor",
    "cores": 2,
    "threads": 2,
    "memory_gib": 24.0,
    "instructions": ["avx2"],
    "accelerators": [],
}
DONE = {"date": "2026-01-02 03:04", "seconds": 12.3, "load_before": 0.1, "load_after": 1.9, "revision": "abc"}


def time_row(suite, way, milliseconds, **others):
    spread = {"median_ms": milliseconds, "q1_ms": 0.9 * milliseconds, "q3_ms": 1.1 * milliseconds, "rounds": 9}
    sizes = {"batch": 1, "visual_tokens": 576, "kept_tokens": 294, "reduction": 0.49}
    return {"suite": suite, "way": way, **sizes, **spread, **others}


def headline_rows(ratios, batch=1, decoder="pruned"):
    """Rows of three ways for ``{reduction: (ratio, low, high)}``."""
    rows = []
    for reduction, (ratio, low, high) in ratios.items():
        same = {"suite": "headline", "batch": batch, "reduction": reduction, "ratio_to": "native short"}
        for way, name, milliseconds, interval in (
            ("native short", None, 100.0, (1.0, 1.0, 1.0)),
            ("native short, again", None, 101.0, (1.01, 0.99, 1.03)),
            (f"compressed, {decoder}", decoder, 100.0 * ratio, (ratio, low, high)),
        ):
            found = dict(zip(("ratio", "ratio_low", "ratio_high"), interval, strict=True))
            rows.append({**time_row(way=way, milliseconds=milliseconds, **same), "decoder": name, **found})
    return rows


def stage_rows(batch=1, prefill=400.0, reading=1.0):
    same = {"suite": "stages", "batch": batch, "reduction": 0.49}
    passes = [("uncompressed", prefill), ("native short", prefill / 2), ("compressed, pruned", prefill / 2)]
    rows = [time_row(way=way, milliseconds=value, stage="prefill", share=0.5, **same) for way, value in passes]
    steps = {"reading, pruned": reading, "plan": 0.5, "pool": 0.25, "rewrite": 0.25}
    return rows + [time_row(way="by itself", milliseconds=value, stage=name, **same) for name, value in steps.items()]


@pytest.fixture
def make_record():
    """A function that makes a record from rows; options replace its fields, those of ``shape`` one by one."""

    def make(rows, name="by-hand", shape=(), **fields):
        suites = {row["suite"]: dict(DONE) for row in rows}
        versions, settings = {"python": "3.11", "torch": "2"}, {"decoders": ["pruned", "linear"], "images": 1}
        full = None if shape is None else {**SHAPE, **dict(shape)}
        record = Record(
            name, f"dualstream bench --name {name}", "2026-01-02 03:04", dict(MACHINE), versions, full, settings
        )
        return replace(record, suites=suites, rows=list(rows), **fields)

    return make


@pytest.fixture
def by_hand():
    """The functions that make rows."""

    class Rows:
        time, headline, stages = staticmethod(time_row), staticmethod(headline_rows), staticmethod(stage_rows)

    return Rows
