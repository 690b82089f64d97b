"""``dualstream doctor [MODEL]``: what works here and for this checkpoint, each line a check that was really run."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dualstream.cli import Result, add_model_arguments, open_model

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "PIL")
OPTIONAL_PACKAGES = {"trl": "train", "peft": "train", "accelerate": "train", "lmms_eval": "eval", "gradio": "space"}
# what is checked -> function of ``model_checks``
CHECKS = {
    "image spans": "check_spans",
    "image spans, odd sizes": "check_sizes",
    "grid": "check_grid",
    "lens, first entry": "check_lens_entries",
    "lens identity": "check_lens",
    "compression, nothing merged": "check_identity",
    "compression, rle": "check_compression",
    "ablation of nothing": "check_ablation_of_nothing",
    "ablation of all visual tokens": "check_ablation_of_all",
    "knockout of nothing, of one destination": "check_knockout_of_nothing",
    "knockout of all visual tokens": "check_knockout",
    "scorers": "check_scorers",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked.
        ok: whether it holds, or is ruled out by the architecture.
        detail: the numbers behind it, or the reason.
        limited: whether the architecture rules it out; the detail says why.
    """

    name: str
    ok: bool
    detail: str
    limited: bool = False

    @property
    def mark(self) -> str:
        """How a person sees it."""
        return "limit" if self.limited else "ok" if self.ok else "FAIL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("checkpoint", nargs="?", default=None, metavar="MODEL", help="the same as --model MODEL")


def run(args: argparse.Namespace) -> Result:
    """Check the environment, then the checkpoint; write its support card."""
    name = args.checkpoint or args.model
    environment = describe_environment()
    checks, card = check_model(lambda: open_model(args, name))
    ok = all(check.ok for check in checks)
    payload = {
        "model": name,
        "ok": ok,
        "environment": environment,
        "checks": [asdict(check) for check in checks],
        "card": card,
    }
    lines = [f"{key:>14}  {value}" for key, value in environment.items()]
    return Result(payload, "\n".join([*lines, "", *format_card(name, checks, card)]), ok)


def format_card(name: str, checks: list[Check], card: dict[str, Any]) -> list[str]:
    """The support card as lines: what the model is, what was checked, what is limited and why."""
    lines = [f"{name}:"]
    lines += [f"  {key}: {value}" for key, value in card.items() if key != "limits"]
    lines += ["", *(f"  {check.mark:<5}  {check.name}: {check.detail}" for check in checks)]
    if card.get("limits"):
        lines += ["", "  limits:", *(f"  - {limit}" for limit in card["limits"])]
    return lines


def describe_environment() -> dict[str, str]:
    """Versions of what is installed and the devices that torch sees."""
    import torch

    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in PACKAGES:
        found[package] = getattr(importlib.import_module(package), "__version__", "installed")
    for package, extra in OPTIONAL_PACKAGES.items():
        installed = importlib.util.find_spec(package) is not None
        found[package] = "installed" if installed else f"absent (pip install 'dualstream[{extra}]')"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
    return found


def check_model(load: Callable[[], tuple[Any, Any]]) -> tuple[list[Check], dict[str, Any]]:
    """Run every check on the model that ``load`` returns; a check that raises is a failed check.

    Returns:
        The checks, and what the model is made of (empty if it could not be told).
    """
    from . import model_checks
    from .model_checks import NotPossible

    try:
        model, processor = load()
    except (ValueError, OSError) as error:
        return [Check("load", False, str(error))], {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checks = [Check("load", True, f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {model.dtype}")]
    inputs: Any = None
    card: dict[str, Any] = {}
    for name, function_name in CHECKS.items():
        try:
            inputs = model_checks.probe_inputs(model, processor) if inputs is None else inputs
            card = card or model_checks.describe(model, processor, inputs)
            check = Check(name, *getattr(model_checks, function_name)(model, processor, inputs))
        except NotPossible as reason:
            check = Check(name, True, str(reason), limited=True)
        except Exception as error:  # the doctor reports every way a checkpoint can fail
            check = Check(name, False, f"{type(error).__name__}: {error}")
        checks.append(check)
    return checks, card
