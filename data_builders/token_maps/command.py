"""``dualstream build token-maps``: pictures read as text, as a dataset that others can load."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, open_model

from .sources import ACCEPTED, ImageSource, open_source

if TYPE_CHECKING:
    from .build import BuildOptions
    from .reading import MapReader

MEASURED_IMAGES = 320


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--images", required=True, metavar="SOURCE", help=ACCEPTED.replace("%", "%%"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the corpus; a killed build goes on there")
    _add_source_arguments(parser.add_argument_group("source"))
    _add_reading_arguments(parser.add_argument_group("readings"))
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=16, help="pictures per forward pass (default: %(default)s)")
    work.add_argument(
        "--rows-per-shard", type=int, default=1000, help="pictures per shard, rows of a file (default: %(default)s)"
    )
    work.add_argument(
        "--num-shards",
        type=int,
        default=1,
        metavar="N",
        help="share the work among N processes; under torchrun or accelerate launch each share is split further",
    )
    work.add_argument("--shard", type=int, default=0, metavar="I", help="which of the N shares to make, from 0")
    work.add_argument("--finalize", action="store_true", help="check the finished shards and write the card anew")
    work.add_argument(
        "--measure-throughput",
        type=int,
        metavar="ROUNDS",
        help=f"build nothing; time the build against bare forward passes over the first {MEASURED_IMAGES} pictures",
    )
    card = parser.add_argument_group("card")
    card.add_argument("--license", help="licence of the pictures, as the Hub abbreviates it, e.g. cc-by-4.0")
    card.add_argument("--provenance", metavar="TEXT", help="where the pictures come from, a sentence")
    card.add_argument("--title", help="heading of the card")


def _add_source_arguments(group: Any) -> None:
    group.add_argument("--split", help="split of a dataset, and name of the corpus's split (default: train)")
    group.add_argument("--image-column", help="image column of a dataset (default: its only one)")
    group.add_argument("--id-column", help="column of a dataset that names its pictures")
    group.add_argument("--config", help="configuration (subset) of a dataset")
    group.add_argument("--revision", help="branch, tag or commit of a dataset on the Hub")
    group.add_argument("--limit", type=int, metavar="N", help="take the first N pictures only")


def _add_reading_arguments(group: Any) -> None:
    group.add_argument(
        "--depths",
        default="connector,last",
        help="where to read: connector, a number of language-model blocks, last; with commas (default: %(default)s)",
    )
    group.add_argument("--top-k", type=int, default=5, help="readings kept per token (default: %(default)s)")
    group.add_argument("--no-final-norm", action="store_true", help="skip the last norm before the output matrix")
    group.add_argument("--decoder", type=Path, metavar="DIR", help="visual decoder to read the connector with")


def run(args: argparse.Namespace) -> Result:
    """Build the share of this process, and finish the corpus if that was the last one."""
    from .build import BuildOptions, build_shards, open_corpus
    from .card import CardFields, finalize, is_finalized
    from .schedule import Share

    share = Share.from_environment(args.num_shards, args.shard)
    options = BuildOptions(args.batch_size, args.rows_per_shard)
    if args.out is None and args.measure_throughput is None:
        raise ValueError("--out is needed: the folder that gets the corpus.")
    source = open_source(
        args.images, args.split, args.image_column, args.id_column, args.config, args.revision, args.limit
    )
    reader = _open_reader(args)
    if args.measure_throughput is not None:
        return _measured(source, reader, options, args.measure_throughput)
    began = time.monotonic()
    corpus = open_corpus(source, reader, options, args.out)
    report = None if args.finalize else build_shards(source, reader, corpus, share)
    missing = corpus.missing()
    if args.finalize or (missing == [] and (report is None or report.shards or not is_finalized(corpus))):
        finalize(corpus, source, reader, CardFields(args.license, args.provenance, args.title))
    payload = {
        "out": str(args.out),
        "complete": missing == [],
        "missing_shards": None if missing is None else len(missing),
        "images_in_source": corpus.count,
        "workers": share.workers,
        "worker": share.worker,
        "orphans_removed": corpus.orphans,
        "seconds": round(time.monotonic() - began, 1),
        **({} if report is None else asdict(report)),
    }
    return Result(payload, _summary(payload))


def _open_reader(args: argparse.Namespace) -> MapReader:
    from dualstream.modeling import VisualDecoder

    from .reading import MapReader

    if args.device is None and "LOCAL_RANK" in os.environ:
        args.device = _device_of_rank(int(os.environ["LOCAL_RANK"]))
    model, processor = open_model(args)
    decoder = None if args.decoder is None else VisualDecoder.from_pretrained(args.decoder).to(model.device)
    return MapReader(model, processor, args.model, args.depths, not args.no_final_norm, args.top_k, decoder)


def _device_of_rank(rank: int) -> str | None:
    """One accelerator per process of a node, where there are accelerators."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else f"{accelerator.type}:{rank % torch.accelerator.device_count()}"


def _measured(source: ImageSource, reader: MapReader, options: BuildOptions, rounds: int) -> Result:
    from .throughput import describe_throughput, measure_throughput

    if rounds < 1:
        raise ValueError(f"--measure-throughput must be at least 1 round, got {rounds}.")
    figures = measure_throughput(source, reader, options, MEASURED_IMAGES, rounds)
    return Result(figures, describe_throughput(figures))


def _summary(payload: dict[str, Any]) -> str:
    lines = []
    if "shards" in payload:
        lines.append(
            f"worker {payload['worker']} of {payload['workers']}: {payload['images']} images in {payload['shards']} "
            f"shards, {payload['skipped']} shards were finished before, {payload['rejected']} images could not be read"
        )
    if payload["complete"]:
        lines.append(f"the corpus is complete: {payload['out']}/README.md")
    else:
        left = "shards" if payload["missing_shards"] is None else f"{payload['missing_shards']} shards"
        lines.append(f"other shares are not finished: {left} missing in {payload['out']}")
    return "\n".join(lines)
