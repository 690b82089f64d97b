"""Write what a run has trained, and read it back into the live model, exactly and with every name accounted for.

The stock Trainer reloads a fully trained vision-language model by names that ``save_pretrained`` does not write, finds
none of them, warns, and goes on from the weights the run began with. Here names that do not match are an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

ADAPTER_FILE = "adapter_model.safetensors"
EXTRA_FILE = "trained_beside_adapter.safetensors"


def save_trained(model: Any, folder: Path) -> None:
    """Write a checkpoint: the whole model, or the adapter and what is trained beside it.

    Args:
        model: a transformers model, possibly wrapped by PEFT.
        folder: where.
    """
    if not _is_peft(model):
        # The names of the live model, whatever layout it was loaded from.
        model.save_pretrained(folder, save_original_format=False)
        return
    model.save_pretrained(folder, save_embedding_layers=False)
    extra = _trained_beside_adapter(model)
    if extra:
        save_file({name: p.detach().contiguous() for name, p in extra.items()}, folder / EXTRA_FILE)


def load_trained(model: Any, folder: Path) -> None:
    """Read a checkpoint of ``save_trained`` into a model of the same make.

    Raises:
        ValueError: the checkpoint lacks a weight or has one too many.
    """
    if not _is_peft(model):
        _load_whole(model, folder)
        return
    _load_adapter(model, folder)
    extra, path = _trained_beside_adapter(model), folder / EXTRA_FILE
    stored = load_file(path) if path.is_file() else {}
    _require_same_names(set(extra), set(stored), path)
    with torch.no_grad():
        for name, parameter in extra.items():
            parameter.copy_(stored[name])


def _load_whole(model: nn.Module, folder: Path) -> None:
    stored = _read_model_files(folder)
    live = model.state_dict()
    # Tied weights are stored once, under one of their names.
    present = {tensor.data_ptr() for name, tensor in live.items() if name in stored and tensor.numel()}
    needed = {name for name, tensor in live.items() if name in stored or tensor.data_ptr() not in present}
    _require_same_names(needed, set(stored), folder)
    model.load_state_dict(stored, strict=False)


def _read_model_files(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no complete checkpoint: {name} is missing.")
        stored |= load_file(folder / name)
    return stored


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint of a LoRA run: {ADAPTER_FILE} is missing.")
    stored = load_file(path)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    _require_same_names(set(live), set(stored), path)
    set_peft_model_state_dict(model, stored)


def _trained_beside_adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _require_same_names(live: set[str], stored: set[str], place: Path) -> None:
    for what, names in (("lacks", live - stored), ("has unknown", stored - live)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{place} {what} {len(names)} weight(s) ({shown}{', ...' * (len(names) > 3)}): it is not a checkpoint "
                "of this model with this choice of what is trained."
            )
