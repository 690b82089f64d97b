"""The product's own steps as they are against an older revision of ``modeling/``, on the same tensors, in turns.

``python -m dualstream.benchmarks.before_after --revision REV``
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import dualstream.modeling
from dualstream.measuring import Clock, against, count_work, interleaved, repeated, timing

from .forced_map import forced_ids
from .shapes import build_model, shape_named
from .workload import image_inputs_of, make_inputs

RECORDED = "66888c4"  # before the work on speed
ROOT = Path(__file__).resolve().parents[1]
MODULES = ("vocabulary_scores", "visual_compression", "prompt_plan", "compression_report", "compression_context")
# Cells, width and rows of the matrix that a slice of a vocabulary has: time is proportional to rows.
READINGS = {"llava-1.5-7b": (576, 4096), "qwen2.5-vl-7b": (1280, 3584)}
SLICE, PRUNED = 16_384, 8192
GRIDS, BATCHES, WIDTH, TEXT_TOKENS, IMAGE_TOKEN = ((24, 24), (32, 40)), (1, 8), 3584, 48, 9
REDUCTION, REPEATS = 0.49, 10
WHOLE = {"tiny": torch.float32, "llava-1.5-7b": torch.bfloat16}


@dataclass
class Case:
    """One step, old and new.

    Attributes:
        kind: ``read``, ``plan``, ``pool``, ``rewrite``, ``compress`` or ``prefill``.
        what: which tensors.
        batch: pictures.
        visual_tokens: cells of all of them.
        before: the step of the older revision; returns tensors.
        after: the step as it is.
        repeats: calls per timed run.
    """

    kind: str
    what: str
    batch: int
    visual_tokens: int
    before: Callable[[], Any]
    after: Callable[[], Any]
    repeats: int = 1


@contextmanager
def older_modeling(revision: str, name: str = "dualstream_before") -> Iterator[dict[str, ModuleType]]:
    """Import the flat files of ``modeling/`` at a git revision as a package of another name, for the block.

    Raises:
        ValueError: the package does not lie in a git checkout that knows the revision.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "--", "modeling"]
    found = subprocess.run(command, capture_output=True, check=False)
    if found.returncode:
        raise ValueError(f"revision={revision!r} cannot be read from {ROOT}: {found.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            files = [member for member in archive.getmembers() if member.name.endswith(".py")]
            archive.extractall(folder, members=files, filter="data")
        package = ModuleType(name)  # without the real __init__, which registers classes with transformers
        package.__path__ = [str(Path(folder) / "modeling")]
        sys.modules[name] = package
        try:
            yield {module: importlib.import_module(f"{name}.{module}") for module in MODULES}
        finally:
            for module in [module for module in sys.modules if module.split(".")[0] == name]:
                del sys.modules[module]


def run(
    rounds: int,
    clock: Clock,
    progress: Callable[[], Any] | None = None,
    revision: str | None = None,
    whole: dict[str, torch.dtype] | None = None,
    rows: int = SLICE,
) -> list[dict[str, Any]]:
    """Time and count every step before and after.

    Args:
        rounds: of every case, before and after in turns.
        clock: of the device.
        progress: called after every timed run.
        revision: older revision, None for the recorded one.
        whole: shapes of the models, cut to one block, on which the whole path is run, with their dtypes.
        rows: of the matrices that are read with.

    Returns:
        Two rows per case: ``before``, and ``after`` with its ratio to it and whether results are equal.
    """
    now = {name: importlib.import_module(f"{dualstream.modeling.__name__}.{name}") for name in MODULES}
    found: list[dict[str, Any]] = []
    with older_modeling(revision or RECORDED) as old, torch.no_grad():
        for case in _cases(old, now, clock.device, WHOLE if whole is None else whole, rows):
            steps = {"before": case.before, "after": case.after}
            equal = _same(case.before(), case.after())
            counts = {way: count_work(step, flops=False) for way, step in steps.items()}
            timed = {way: repeated(step, case.repeats) for way, step in steps.items()}
            seconds = interleaved(timed, rounds, clock=clock, progress=progress)
            for way, work in counts.items():
                facts = {"kind": case.kind, "what": case.what, "batch": case.batch, "equal": equal}
                times = timing(seconds[way] / case.repeats)
                work_done = {"operations": work.operations, "waits": work.waits, "peak_bytes": work.peak_bytes}
                row = {"suite": "before_after", "way": way, **facts, "visual_tokens": case.visual_tokens, **times}
                other = against(seconds["after"], seconds["before"], "before") if way == "after" else {}
                found.append({**row, **work_done, **other, "revision": revision or RECORDED})
    return found


def _cases(old: Any, now: Any, device: torch.device, whole: dict[str, torch.dtype], rows: int) -> Iterator[Case]:
    """Make the cases one after the other, so that only one holds its tensors."""
    for name, (cells, width) in READINGS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for size, k in ((rows, 1), (rows, 2), (min(PRUNED, rows), 1)):
                yield _reading(old, now, name, torch.randn(cells, width, device=device).to(dtype), size, k)
    for grid in GRIDS:
        for batch in BATCHES:
            yield from _steps(old, now, grid, batch, device)
    for name, dtype in whole.items():
        yield from _whole(old, now, name, dtype, device)


def _reading(old: Any, now: Any, name: str, features: torch.Tensor, rows: int, k: int) -> Case:
    weight = (0.02 * torch.randn(rows, features.shape[1], device=features.device)).to(features.dtype)
    kind = str(features.dtype).removeprefix("torch.")
    return Case(
        "read",
        f"{name} {kind}, {rows} rows, k={k}",
        1,
        len(features),
        lambda: old["vocabulary_scores"].top_k_tokens(features, weight, k)[0],
        lambda: now["vocabulary_scores"].best_tokens(features, weight, k),
    )


def _steps(old: Any, now: Any, grid: tuple[int, int], batch: int, device: torch.device) -> Iterator[Case]:
    grids, cells = torch.tensor([grid] * batch), grid[0] * grid[1]
    first = forced_ids(grids, REDUCTION)
    ids = torch.stack([first, first + 2], dim=1).to(device)
    meaningless = torch.arange(4, device=device) % 2 == 1

    def plan(version: Any, method: str) -> Any:
        config = version["visual_compression"].CompressionConfig(method)
        return version["visual_compression"].run_length_plan(ids, grids, config, meaningless)

    def fields(version: Any, method: str) -> Callable[[], Any]:
        return lambda: [getattr(plan(version, method), name) for name in ("segment", "anchor", "kept_per_block")]

    size = (batch, batch * cells)
    for method in ("rle", "rle_drop_top2"):
        yield Case("plan", method, *size, fields(old, method), fields(now, method), REPEATS)
    plans = {"old": plan(old, "rle"), "now": plan(now, "rle")}
    for dtype in (torch.bfloat16, torch.float32):
        features = torch.randn(batch * cells, WIDTH, device=device).to(dtype)

        def pool(version: Any, made: Any, features: torch.Tensor = features) -> Callable[[], Any]:
            return lambda: version["visual_compression"].merge_features(features, made, "mean")

        what = str(dtype).removeprefix("torch.")
        yield Case("pool", what, *size, pool(old, plans["old"]), pool(now, plans["now"]))

    prompts = torch.tensor([1] + [IMAGE_TOKEN] * cells + [5] * (TEXT_TOKENS - 1), device=device).repeat(batch, 1)
    mask, anchor = torch.ones_like(prompts), plans["now"].anchor

    def rewritten() -> Any:
        module = now["prompt_plan"]
        host = module.on_host({"input_ids": prompts, "attention_mask": mask})
        placeholder, kept = host["input_ids"] == IMAGE_TOKEN, plans["now"].kept_per_block
        length = module.shortened_length(placeholder, host["attention_mask"], kept, "suffix")
        return module.plan_prompt(prompts, mask, IMAGE_TOKEN, anchor, batch * cells, "suffix", length).order

    def rewritten_before() -> Any:
        return old["prompt_plan"].plan_prompt(prompts, mask, IMAGE_TOKEN, anchor, batch * cells, "suffix").order

    yield Case("rewrite", "suffix", *size, rewritten_before, rewritten, REPEATS)


def _whole(old: Any, now: Any, name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Compressing the encoder's output, and the whole pass to the first token, with a decoder that makes runs."""
    model: Any = build_model(name, 1, 1, dtype=dtype, device=device)
    inputs = make_inputs(model, shape_named(name).image_size, batch=2)
    pictures = image_inputs_of(model, inputs)
    weight = model.get_output_embeddings().weight.clone()
    weight[:4] *= 20  # few different readings
    output = model.model.get_image_features(**pictures, return_dict=True)

    def compress(version: Any) -> Callable[[], Any]:
        report = version["compression_report"]
        decoder, config = report.VisualDecoder.from_unembedding(weight), report.CompressionConfig("rle")

        def step() -> Any:
            pooled, found = report.compress_image_output(model, output, pictures, inputs, config, decoder)
            return [found.ids, found.plan.segment, torch.cat(list(pooled.pooler_output))]

        return step

    def prefill(version: Any) -> Callable[[], Any]:
        decoder = version["compression_report"].VisualDecoder.from_unembedding(weight)

        def step() -> Any:
            with version["compression_context"].compressing(model, "rle", decoder=decoder):
                return model(**inputs, logits_to_keep=1).logits

        return step

    cells = int((inputs["input_ids"] == model.config.image_token_id).sum())
    for kind, make in (("compress", compress), ("prefill", prefill)):
        what = f"{name}, one block, {str(dtype).removeprefix('torch.')}"
        yield Case(kind, what, 2, cells, make(old), make(now))


def _same(before: Any, after: Any) -> bool:
    """Whether integers are equal and other numbers too, but for the order of float32 sums."""
    if isinstance(before, list):
        return all(_same(one, other) for one, other in zip(before, after, strict=True))
    if before.shape != after.shape:
        return False
    if before.is_floating_point():
        return bool(torch.allclose(before.float(), after.float(), rtol=1e-5, atol=1e-5))
    return bool(torch.equal(before.cpu(), after.cpu()))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line: a line per case, and the rows as JSON if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revision", default=RECORDED)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = run(options.rounds, Clock(options.device), revision=options.revision)
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        name = f"{after['kind']}, {after['what']}, batch {after['batch']}, {after['visual_tokens']} tokens"
        times = f"{before['median_ms']:.2f} -> {after['median_ms']:.2f} ms"
        ratio = f"x {after['ratio']:.2f} ({after['ratio_low']:.2f} to {after['ratio_high']:.2f})"
        counts = (
            f"operations {before['operations']} -> {after['operations']}, waits {before['waits']} -> {after['waits']}"
        )
        memory = f"peak {before['peak_bytes'] / 1e6:.1f} -> {after['peak_bytes'] / 1e6:.1f} MB"
        print(f"{name}: {times}, {ratio}, {counts}, {memory}, {'equal' if after['equal'] else 'DIFFERENT'}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
