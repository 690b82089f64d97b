"""Command line: ``python -m dualstream.data_builders.scenes --out DIR --split train --n 10000``."""

import argparse
import json
from pathlib import Path

from datasets.utils.logging import disable_progress_bar

from .build import write_scenes
from .scene import SPLIT_SEEDS


def main() -> None:
    """Write one split and print its manifest entry."""
    parser = argparse.ArgumentParser(prog="python -m dualstream.data_builders.scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets data/*.parquet and manifest.json")
    parser.add_argument("--split", choices=list(SPLIT_SEEDS), default="train")
    parser.add_argument("--n", type=int, default=1000, help="number of scenes")
    parser.add_argument("--size", type=int, default=96, help="shorter side of the pictures in pixels")
    parser.add_argument("--aspect", type=float, default=1.0, help="width divided by height")
    parser.add_argument("--shard-rows", type=int, default=1000)
    arguments = vars(parser.parse_args())
    disable_progress_bar()
    print(json.dumps(write_scenes(**arguments), indent=2))


if __name__ == "__main__":
    main()
