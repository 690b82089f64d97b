"""``dualstream read IMAGE``: one image as a grid of words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

if TYPE_CHECKING:
    from dualstream.processing import TokenMap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("image", help="picture file of any size and mode")
    add_model_arguments(parser)
    parser.add_argument(
        "--depth",
        type=int,
        default=None,
        metavar="K",
        help="run K language-model blocks and read there (logit lens); default: the visual decoder, before the LLM",
    )
    parser.add_argument("--no-final-norm", action="store_true", help="skip the final norm before the unembedding")
    parser.add_argument("--top-k", type=int, default=3, help="words kept for each cell (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an interactive page")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the words drawn over the picture (PNG)")


def run(args: argparse.Namespace) -> Result:
    """Read the image and write the files asked for."""
    from dualstream.processing import load_image, read_image

    if args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}.")
    image = load_image(args.image)
    model, processor = open_model(args)
    token_map = read_image(
        model, processor, image, depth=args.depth, final_norm=not args.no_final_norm, top_k=args.top_k
    )
    written = []
    if args.html:
        args.html.write_text(token_map.to_html(), encoding="utf-8")
        written.append(str(args.html))
    if args.picture:
        token_map.to_image().save(args.picture)
        written.append(str(args.picture))
    payload = {
        "image": str(args.image),
        **model_facts(args.model, model),
        "depth": "visual_decoder" if args.depth is None else args.depth,
        "final_norm": not args.no_final_norm,
        **reading_payload(token_map),
        "files": written,
    }
    text = token_map.to_text() + "".join(f"\nwrote {path}" for path in written)
    return Result(payload, text)


def reading_payload(token_map: TokenMap) -> dict[str, Any]:
    """``grid`` (rows, columns of every block), ``tokens`` (words in raster order) and ``runs`` as JSON values."""
    return {
        "grid": [list(grid) for grid in token_map.grids],
        "tokens": token_map.words,
        "runs": [{"word": run.word, "length": run.length, "start": run.start} for run in token_map.runs],
    }
