"""Time and memory of every experiment on large pictures, each in a process of its own.

``python -m dualstream.analysis.where.cost --model tiny-qwen2-vl --grid 30x41`` prints one JSON object per experiment;
30 x 41 = 1,230 visual tokens are what Qwen2-VL makes of a photograph of 1,280 x 960 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Bench
from .experiment import EXPERIMENTS, make_experiment
from .items import PairSource, scene_pair

if TYPE_CHECKING:
    from PIL.Image import Image

    from dualstream.analysis.annotated_images import AnnotatedImage

    from .items import ObjectPair

PAIRS = 2


def large_bench(model_name: str, grid: tuple[int, int], pair_count: int = PAIRS) -> Bench:
    """Pairs of pictures that give a grid of (rows, cols) visual tokens, asked one at a time.

    Raises:
        ValueError: the model resizes every picture to one grid, which is another one.
    """
    from dualstream.modeling import load_model
    from dualstream.modeling.families import family_of
    from dualstream.processing import register_processors
    from dualstream.train.sft import set_resolution

    register_processors()
    model, processor = load_model(model_name)
    rows, cols = grid
    if family_of(model).has_mrope:
        images = processor.image_processor
        cell = images.patch_size * images.merge_size
        size = (cols * cell, rows * cell)
        set_resolution(model, processor, size[0] * size[1], size[0] * size[1])
    else:
        size = (cols * 12, rows * 12)
    pairs = tuple(enlarged(scene_pair(1_100_000_000 + number), size) for number in range(pair_count + 1))
    source = PairSource("scenes", pairs[:pair_count], pairs[pair_count:])
    bench = Bench(model, processor, source, 0, 1, model_name)
    found = bench.geometry(size).grids
    if found != [grid]:
        raise ValueError(f"{model_name} makes {found} visual tokens of a picture of {size} pixels, not {[grid]}.")
    return bench


def enlarged(pair: ObjectPair, size: tuple[int, int]) -> ObjectPair:
    """The pair with its pictures stretched to (width, height), boxes too; masks are left out."""
    items = []
    for item in pair.items:
        old = item.picture.size or item.image().size
        x, y = size[0] / old[0], size[1] / old[1]
        objects = tuple(
            replace(thing, box=(left * x, top * y, right * x, bottom * y), read_mask=None)
            for thing in item.picture.objects
            for left, top, right, bottom in [thing.box]
        )
        picture = replace(item.picture, objects=objects, size=size, open_image=partial(_stretched, item.picture, size))
        items.append(replace(item, picture=picture))
    return replace(pair, items=tuple(items))


def _stretched(picture: AnnotatedImage, size: tuple[int, int]) -> Image:
    return picture.image().resize(size)


def measure(name: str, model_name: str, grid: tuple[int, int], pair_count: int = PAIRS) -> dict[str, Any]:
    """Run one experiment in this process.

    Returns:
        ``seconds`` and ``cpu_seconds`` of so many pairs, ``start_mib`` (process with the model loaded) and
        ``added_mib`` (peak above it).
    """
    from dualstream.analysis.resumable_rows import ResumableRows

    bench, experiment = large_bench(model_name, grid, pair_count), make_experiment(name)
    reason = experiment.reason_to_skip(bench)
    if reason is not None:
        return {"experiment": name, "skipped": reason}
    before, started, cpu = _peak(), time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        experiment.run(bench, ResumableRows(Path(folder) / "rows", {"cost": name}))
    return {
        "experiment": name,
        "pictures": 4 * pair_count,
        "tokens": grid[0] * grid[1],
        "seconds": round(time.time() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "start_mib": round(before),
        "added_mib": round(_peak() - before),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure one experiment here, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--grid", default="30x41", help="rows x columns of visual tokens")
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), help="one of them (default: all)")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="pairs of objects (default: %(default)s; intervention needs 3)"
    )
    args = parser.parse_args()
    rows, _, cols = args.grid.partition("x")
    if args.experiment:
        print(json.dumps(measure(args.experiment, args.model, (int(rows), int(cols)), args.pairs)))
        return
    for name in EXPERIMENTS:
        command = [sys.executable, "-m", __spec__.name, "--model", args.model, "--grid", args.grid]
        command += ["--pairs", str(args.pairs), "--experiment", name]
        subprocess.run(command, check=True, env=os.environ)


if __name__ == "__main__":
    main()
