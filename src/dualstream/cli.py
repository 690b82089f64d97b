"""The ``dualstream`` command: a table of sub-commands, each a module that is imported only when it is called.

A command module offers ``add_arguments(parser)`` and ``run(args) -> Result``. The dispatcher owns what every command
shares: ``--json`` (one machine-readable object on stdout and nothing else there), logs on stderr, and errors that a
person can act on (exit status 2) instead of tracebacks. A name of two words is a command of a group: ``dualstream
train distill``. A module with ``PASSES_OPTIONS_ON = True`` gets the options it did not declare as ``args.overrides``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# name -> (module, one-line help); adding a command is one row and one module.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("dualstream.analysis.demo", "read and question the embedded pictures, write a report to look at"),
    "read": ("dualstream.analysis.read", "read one image as a grid of words"),
    "ask": ("dualstream.analysis.ask", "ask about one image, with all and with fewer visual tokens"),
    "doctor": ("dualstream.analysis.doctor", "check the environment and what works for a checkpoint"),
    "quiz": ("dualstream.eval.scene_questions", "quick check on held-out scene questions, full against compressed"),
    "eval": ("dualstream.eval.suites.command", "benchmarks through lmms-eval, arm against arm on the same samples"),
    "decoders": ("dualstream.eval.decoder_table", "compare visual decoders: cost, agreement, answers"),
    "bench": ("dualstream.benchmarks.command", "how fast: stages, the limit, peers side by side, growth, memory"),
    "train distill": ("dualstream.train.distill", "teach a visual decoder what the language model reads"),
    "train sft": ("dualstream.train.sft", "fine-tune a model on conversations with pictures, by TRL"),
    "study rope-scaling": (
        "dualstream.analysis.rope_scaling_study.command",
        "does scaling the vision tower's RoPE help with where things are, with controls",
    ),
    "build scenes": ("dualstream.data_builders.scenes.command", "drawn scenes with boxes, masks and questions"),
    "analyze what": ("dualstream.analysis.what.command", "how a picture turns into words, depth by depth"),
    "build token-maps": ("dualstream.data_builders.token_maps.command", "read pictures as text, into a dataset"),
    "build whatsup-bboxes": (
        "dualstream.data_builders.whatsup_boxes.command",
        "What's Up pictures with the boxes of their objects, checked, as a dataset",
    ),
    "build pope-objects": (
        "dualstream.data_builders.pope_objects.command",
        "objects POPE asks about, as a dataset",
    ),
    "build coco-spatial": (
        "dualstream.eval.spatial_tasks.coco_dataset",
        "COCO's where-questions of What's Up, as a dataset",
    ),
    "build spatial-sft": (
        "dualstream.data_builders.spatial_sft.command",
        "conversations about where things are, from scenes or GQA, to fine-tune on",
    ),
    "analyze ablate": (
        "dualstream.analysis.causality.ablations.ablate",
        "which visual tokens carry the answer: replace them, with matched controls",
    ),
    "analyze knockout": (
        "dualstream.analysis.causality.knockouts.knockout_command",
        "on which routes and in which layers the answer travels: cut attention",
    ),
    "analyze lens": (
        "dualstream.analysis.causality.lenses.lens",
        "how often an object's cells read as its class, at which depth, with controls",
    ),
    "analyze replicate": (
        "dualstream.analysis.causality.replication.replicate",
        "a published study as its public code runs it, and mended, side by side",
    ),
    "analyze where": (
        "dualstream.analysis.where.command",
        "how the model knows where things are: geometry, interventions and ablations, with controls",
    ),
    "analyze report": (
        "dualstream.analysis.what_report.command",
        "pages to look at: pictures and what they read as, depth by depth",
    ),
    "space": ("dualstream.hub_cards.space.command", "a web page to try it: upload or draw, read, compress, ask"),
    "export": ("dualstream.hub_cards.export", "a small release folder that takes its weights from a stock checkpoint"),
    "card": ("dualstream.hub_cards.model_card", "write a model's card from its configuration and result files"),
    "release": ("dualstream.hub_cards.release", "check a folder and publish it as a Hub repository"),
}
# first word of two-word commands -> help
GROUPS: dict[str, str] = {
    "train": "train a part of a model",
    "build": "build a data set",
    "analyze": "look inside a frozen model",
    "study": "run an experiment from configuration to table and figures",
}
EXIT_ERROR = 2


@dataclass
class Result:
    """What a command hands back to the dispatcher; an empty one, of a helping process, is not printed.

    Attributes:
        payload: JSON-serialisable object printed under ``--json``.
        text: what a person sees otherwise.
        ok: whether the exit status is 0.
    """

    payload: dict[str, Any]
    text: str
    ok: bool = field(default=True)


def add_model_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the arguments of every command that runs a model, or several one after the other."""
    parser.add_argument(
        "--model",
        default=["tiny-llava"] if several else "tiny-llava",
        nargs="+" if several else None,
        metavar="NAME",
        help="an embedded model (tiny-llava, tiny-qwen2-vl), a Hub id or a local folder (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)"
    )
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument(
        "--rope-scaling",
        default=None,
        metavar="TYPE[:NUMBER...][:AXIS]",
        help="scale the vision tower's rotary frequencies (Qwen-VL models), e.g. poly:99:8, sigmoid, exp:2:w; poly:0 "
        "gives the stock frequencies (default: as the checkpoint says)",
    )


def open_model(args: argparse.Namespace, name: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the model (``name`` or ``args.model``) and its processor, on the device and with the RoPE asked for."""
    from dualstream.modeling import load_model
    from dualstream.processing import register_processors

    register_processors()
    return load_model(name or args.model, device=args.device, dtype=args.dtype, vision_rope_scaling=args.rope_scaling)


def model_facts(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """What a payload says of the model that was run: its name and the scaling of its RoPE, None for the stock one."""
    return {"model": name, "rope_scaling": getattr(model.config, "vision_rope_scaling", None)}


class _ShowVersion(argparse.Action):
    """Looks the version up only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dualstream import __version__

        print(f"dualstream {__version__}")
        parser.exit()


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only ``command``'s module is imported (none for the overview)."""
    parser = argparse.ArgumentParser(
        prog="dualstream",
        description="Read what a vision-language model sees as text, and answer from fewer visual tokens.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    places = {"": commands}
    for group, help_text in GROUPS.items():
        group_parser = commands.add_parser(group, help=help_text, description=help_text.capitalize() + ".")
        places[group] = group_parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, help_text) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        subparser = places[group].add_parser(word, help=help_text, description=help_text.capitalize() + ".")
        subparser.set_defaults(command=name)
        subparser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
        subparser.add_argument("-v", "--verbose", action="store_true", help="tracebacks and library warnings")
        if name == command:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def _quieten_libraries() -> None:
    """Keep the libraries' progress bars and advice off the terminal of a short command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(args: argparse.Namespace, error: Exception) -> int:
    message = str(error) or type(error).__name__
    if args.json:
        print(json.dumps({"error": message, "type": type(error).__name__}))
    print(f"dualstream {args.command}: {message}", file=sys.stderr)
    return EXIT_ERROR


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program name; ``None`` reads ``sys.argv``.

    Returns:
        0 if all is well, 1 if the command ran and found something wrong, 2 if it could not run.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if not word.startswith("-")]
    command = next((name for name in (" ".join(words[:1]), " ".join(words[:2])) if name in COMMANDS), None)
    parser = build_parser(command)
    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    module = importlib.import_module(COMMANDS[args.command][0])
    if args.overrides and not getattr(module, "PASSES_OPTIONS_ON", False):
        parser.error(f"unknown arguments of {args.command}: {' '.join(args.overrides)}")
    if not args.verbose:
        _quieten_libraries()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, stream=sys.stderr)
    try:
        result = module.run(args)
    except (ValueError, OSError) as error:  # what a user can mend; anything else is a bug and keeps its traceback
        if args.verbose:
            raise
        return _fail(args, error)
    if result.payload or result.text:
        print(json.dumps(result.payload, ensure_ascii=False) if args.json else result.text)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
