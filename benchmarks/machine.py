"""What a measurement ran on: processor, memory, accelerators, versions, model; no name of a person, host or folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualstream.eval.decoder_costs import decoder_sizes

from .shapes import build_config, shape_named

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "numpy", "dualstream")
# Instructions that decide how fast matrices are multiplied, as the kernel spells them.
FAST_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
    "sve2",
)
GIB = 2**30


def describe_machine() -> dict[str, Any]:
    """Facts of this machine that decide how fast it is.

    Returns:
        ``system``, ``cpu``, ``cores``, ``threads`` (that torch uses), ``memory_gib``, ``instructions`` (see
        ``FAST_FLAGS``) and ``accelerators``, their names with their memory.
    """
    facts = _cpu_facts()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "instructions": sorted(set(facts.get("flags", facts.get("Features", "")).split()) & set(FAST_FLAGS)),
        "accelerators": _accelerators(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of what ran, CUDA's and the revision of this repository among them where there are any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def revision(root: Path = ROOT) -> str | None:
    """Return the revision of a checkout, with ``+ changes`` where its code differs from it, else None."""
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "*.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name} + changes" if changed else name


def load_average() -> float | None:
    """Return how many processes wanted to run in the last minute, this one included; None where it is not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def describe_model(model: nn.Module, shape: str, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Say what was built of a shape, and what the whole shape has.

    Args:
        model: see ``shapes.build_model``.
        shape: its name.
        image_size: height and width in pixels; the shape's own if None.

    Returns:
        ``name``, ``layers``, ``full_layers``, ``vision_layers``, ``full_vision_layers``, ``hidden_size``,
        ``vocab_size``, ``parameters``, ``dtype``, ``device``, ``image_size``, ``is_toy`` and ``is_reduced``: whether
        a depth or the vocabulary is less than the shape's.
    """
    config: Any = model.config
    whole = build_config(shape)
    vocab_size, hidden_size = decoder_sizes(config)
    layers, full_layers = (part.get_text_config().num_hidden_layers for part in (config, whole))
    vision_layers, full_vision_layers = (_vision_depth(part) for part in (config, whole))
    found: Any = model
    return {
        "name": shape,
        "layers": layers,
        "full_layers": full_layers,
        "vision_layers": vision_layers,
        "full_vision_layers": full_vision_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(found.dtype).removeprefix("torch."),
        "device": found.device.type,
        "image_size": list(image_size or shape_named(shape).image_size),
        "is_toy": shape_named(shape).is_toy,
        "is_reduced": (layers, vision_layers, vocab_size)
        != (full_layers, full_vision_layers, decoder_sizes(whole)[0]),
    }


def _vision_depth(config: Any) -> int:
    tower = config.vision_config
    return tower.num_hidden_layers if hasattr(tower, "num_hidden_layers") else tower.depth


def _cpu_facts() -> dict[str, str]:
    """Fields of the first processor, as the kernel lists them; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    if not torch.cuda.is_available():
        return ["Apple MPS"] if torch.backends.mps.is_available() else []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name}, {device.total_memory / GIB:.0f} GiB" for device in devices]


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
