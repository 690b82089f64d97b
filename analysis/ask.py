"""``dualstream ask IMAGE QUESTION``: the answer from all and from fewer visual tokens."""

from __future__ import annotations

import argparse

from dualstream.cli import Result, add_model_arguments, model_facts, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("image", help="picture file of any size and mode")
    parser.add_argument("question", help="what to ask about it")
    add_model_arguments(parser)
    add_compression_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")


def add_compression_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose a compression; the defaults are those of ``CompressionConfig``."""
    parser.add_argument(
        "--compression",
        default="rle",
        metavar="METHOD",
        help="none, rle, rle_drop_top1, rle_drop_top2, or paper:METHOD for the published behaviour "
        "(default: %(default)s)",
    )
    parser.add_argument("--pooling", default=None, help="mean (default), first or random: how a run becomes one token")
    parser.add_argument("--position-policy", default=None, help="original (default) or compact")
    parser.add_argument("--wrap-rows", action="store_true", default=None, help="let runs cross the end of a grid row")


def compression_from(args: argparse.Namespace):
    """The ``CompressionConfig`` that the arguments describe."""
    from dataclasses import replace

    from dualstream.modeling import CompressionConfig

    overrides = {
        name: getattr(args, name)
        for name in ("pooling", "position_policy", "wrap_rows")
        if getattr(args, name) is not None
    }
    return replace(CompressionConfig.from_any(args.compression), **overrides)


def run(args: argparse.Namespace) -> Result:
    """Answer twice, with all visual tokens and with the compressed prompt."""
    from dualstream.processing import answer_questions, load_image

    compression = compression_from(args)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if not args.question.strip():
        raise ValueError("question must not be empty: write what you want to know of the image.")
    image = load_image(args.image)
    model, processor = open_model(args)
    options = {"max_new_tokens": args.max_new_tokens}
    (full,) = answer_questions(model, processor, [image], [args.question], **options)
    (short,) = answer_questions(model, processor, [image], [args.question], compression=compression, **options)
    payload = {
        "image": str(args.image),
        "question": args.question,
        **model_facts(args.model, model),
        "compression": compression.to_dict(),
        "answer": short.text,
        "answer_full": full.text,
        "visual_tokens": short.visual_tokens,
        "kept_tokens": short.kept_tokens,
        "reduction_rate": round(short.reduction_rate, 6),
    }
    text = (
        f"{short.text}\n\n"
        f"from {short.kept_tokens} of {short.visual_tokens} visual tokens "
        f"({100 * short.reduction_rate:.1f} % fewer, {compression.method})\n"
        f"with all of them: {full.text}"
    )
    return Result(payload, text)
