"""What a card is about, read from the files of a folder: a model, a small repository without weights, or a part."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .release_checks import safetensors_header
from .release_files import CARD

MODEL, POINTER, DECODER, ADAPTER = "model", "pointer", "decoder", "adapter"
TRAINING = "training.json"


@dataclass(frozen=True)
class Subject:
    """What the files of a folder say.

    Attributes:
        folder: where they lie.
        kind: ``model`` (has weights), ``pointer`` (takes them from a stock checkpoint), ``decoder`` or ``adapter``.
        name: heading of the card; result files may call the model so.
        base: Hub id of the checkpoint that it comes from or belongs to, or an embedded name; None for neither.
        config: of the model; empty for a part.
        processor: its ``processor_config.json``.
        decoder: description of the visual decoder, None if there is none.
        adapter: ``adapter_config.json``.
        training: record of the fine-tuning.
        old_card: metadata of the README that is there.
    """

    folder: Path
    kind: str
    name: str
    base: str | None
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    old_card: dict[str, Any] = field(default_factory=dict)

    @property
    def base_is_on_hub(self) -> bool:
        """Whether strangers can reach the base."""
        return self.base is not None and is_hub_id(self.base)

    @property
    def ours(self) -> bool:
        """Whether the model is of a class of ours, with its code in the folder."""
        return bool(self.config.get("auto_map"))

    @property
    def model_class(self) -> str:
        """Name of the class."""
        return (self.config.get("architectures") or [self.config.get("model_type", "")])[0]

    @property
    def parameters(self) -> int:
        """Numbers in the safetensors files of the folder."""
        total = 0
        parts = self.kind in (DECODER, POINTER)
        for path in self.folder.glob("*.safetensors"):
            if path.name.startswith("visual_decoder") and not parts:
                continue
            tensors = {name: entry for name, entry in safetensors_header(path).items() if name != "__metadata__"}
            if parts:  # the tables of a decoder are no parameters
                tensors = {name: entry for name, entry in tensors.items() if entry["dtype"].startswith(("F", "BF"))}
            for entry in tensors.values():
                count = 1
                for size in entry["shape"]:
                    count *= size
                total += count
        return total

    def is_called(self, recorded: str) -> bool:
        """Whether a result file that names its model so can mean this one."""
        if recorded == self.name:
            return True
        tail, own = PurePath(recorded).parts, self.folder.resolve().parts
        return bool(tail) and own[-len(tail) :] == tail


def read_subject(folder: Path, name: str | None = None, base: str | None = None) -> Subject:
    """Find out what lies in a folder.

    Args:
        folder: to describe.
        name: what it is called; None: as the folder is.
        base: the checkpoint that it comes from; None: as the files say.

    Raises:
        ValueError: nothing is there that a card can be about, a file is damaged, or `base` contradicts the files.
    """
    if not folder.is_dir():
        raise ValueError(f"PATH {folder} is no folder.")
    config, adapter = _json(folder / "config.json"), _json(folder / "adapter_config.json")
    decoder = _json(folder / "visual_decoder.json")
    if not (config or adapter or decoder):
        raise ValueError(f"PATH {folder} holds no config.json, adapter_config.json or visual_decoder.json.")
    kind = MODEL if config else ADAPTER if adapter else DECODER
    pointer = (config or {}).get("weights_from")
    if pointer:
        kind = POINTER
    if config and decoder is None and "visual_decoder_kind" in config:
        decoder = _decoder_in_weights(config)
    training = _json(folder / TRAINING)
    old = _old_card(folder / CARD)
    found = _base(pointer, adapter, training, decoder if kind == DECODER else None, old)
    if base and found and is_hub_id(found) and found != base:
        raise ValueError(f"--base-model {base} contradicts the files of {folder}, which name {found}.")
    return Subject(
        folder=folder,
        kind=kind,
        name=name or folder.resolve().name,
        base=base or found,
        config=config or {},
        processor=_json(folder / "processor_config.json") or {},
        decoder=decoder,
        adapter=adapter or {},
        training=training,
        old_card=old,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME and no folder by its looks."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _decoder_in_weights(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config") or {}
    return {
        "kind": config["visual_decoder_kind"],
        "num_classes": config.get("visual_decoder_classes") or text.get("vocab_size"),
        "training": config.get("visual_decoder_training"),
    }


def _base(
    pointer: dict[str, Any] | None,
    adapter: dict[str, Any] | None,
    training: dict[str, Any] | None,
    decoder: dict[str, Any] | None,
    old: dict[str, Any],
) -> str | None:
    """The checkpoint behind, from the file that knows it best."""
    stated = old.get("base_model")
    candidates = (
        (pointer or {}).get("repo_id"),
        ((training or {}).get("manifest") or {}).get("settings", {}).get("model"),
        (adapter or {}).get("base_model_name_or_path"),
        ((decoder or {}).get("training") or {}).get("model"),
        stated[0] if isinstance(stated, list) and stated else stated,
    )
    return next((str(name) for name in candidates if name), None)


def _old_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from huggingface_hub import RepoCard

    try:
        return RepoCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except ValueError as error:
        raise ValueError(f"{path}: its metadata cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content
