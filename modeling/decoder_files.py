"""The two files of a visual decoder, by themselves or beside the weights of a stock checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

WEIGHTS_NAME = "visual_decoder.safetensors"
CONFIG_NAME = "visual_decoder.json"


def save_decoder_files(
    directory: str | os.PathLike, tensors: dict[str, torch.Tensor], description: dict[str, Any]
) -> None:
    """Write both files into a folder, each replaced at once, the description last: a folder that has it is complete.

    Args:
        directory: made if absent.
        tensors: weight and tables.
        description: JSON values.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    weights, config = (folder / f".{name}.unfinished" for name in (WEIGHTS_NAME, CONFIG_NAME))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
    config.write_text(text, encoding="utf-8")
    os.replace(weights, folder / WEIGHTS_NAME)
    os.replace(config, folder / CONFIG_NAME)


def load_decoder_files(
    source: str | os.PathLike, hub_arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read both files from a folder or a Hub repository.

    Returns:
        Description and tensors.

    Raises:
        ValueError: if a file is missing or unreadable, or the source cannot be reached.
    """
    paths = {name: _find(source, name, hub_arguments) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        whole = "holds no visual decoder" if len(missing) == 2 else "holds half of a visual decoder"
        raise ValueError(f"{source} {whole}: the file {missing[0]} is missing")
    try:
        description = json.loads(Path(str(paths[CONFIG_NAME])).read_text(encoding="utf-8"))
        tensors = load_file(str(paths[WEIGHTS_NAME]))
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{source} does not hold a readable visual decoder: {error}") from error
    return description, tensors


def holds_decoder(source: str | os.PathLike, **hub_arguments: Any) -> bool:
    """Whether a folder or Hub repository has decoder files beside its weights; in a folder half of the pair counts.

    Raises:
        ValueError: if the source cannot be reached.
    """
    names = (CONFIG_NAME, WEIGHTS_NAME) if os.path.isdir(source) else (CONFIG_NAME,)
    return any(_find(source, name, hub_arguments) is not None for name in names)


def _find(source: str | os.PathLike, name: str, hub_arguments: dict[str, Any]) -> str | None:
    """Return the local path of a file, downloaded if need be; None where the source has no such file."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    except OSError as error:
        raise ValueError(f"{source} is neither a folder nor a Hub repository that can be reached: {error}") from error
