"""``dualstream export``: a release folder for a stock checkpoint that reads, compresses and scales by itself.

Small, for a base on the Hub: our code, a configuration that says ``weights_from``, the processor and the visual
decoder, tens of megabytes. ``AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)`` takes the
weights from the repository of the base. Programs that read weight files themselves (vLLM, llama.cpp) need a whole
checkpoint: ``--whole``, which is also the way for a base in a folder, such as a fine-tuned model.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result

from .card_subject import is_hub_id

if TYPE_CHECKING:
    from dualstream.modeling import VisualDecoder

RECORDS = "distillation.json", "training.json"  # of the runs that made decoder and weights, for the card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument("--base", required=True, metavar="REPO_ID|DIR", help="the stock checkpoint")
    parser.add_argument(
        "--base-revision", metavar="REVISION", help="of it, pinned as a commit (default: what its main branch is now)"
    )
    parser.add_argument("--decoder", metavar="DIR|REPO_ID", help="a visual decoder (default: the unembedding)")
    parser.add_argument(
        "--whole", action="store_true", help="write the weights too; the only way where --base is a folder"
    )
    parser.add_argument("--compression", metavar="METHOD", help="of the processor, e.g. rle (default: none)")
    parser.add_argument("--rope-scaling", metavar="TYPE[:NUMBER...]", help="of the vision tower, e.g. poly:99:8")


def run(args: argparse.Namespace) -> Result:
    """Write the folder, all of it or nothing."""
    if args.out.exists():
        raise ValueError(f"OUT {args.out} exists; name a new folder.")
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        facts = export(
            unfinished,
            args.base,
            revision=args.base_revision,
            decoder=args.decoder,
            compression=args.compression,
            rope_scaling=args.rope_scaling,
            whole=args.whole,
        )
        os.replace(unfinished, args.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    payload = {"out": str(args.out), "bytes": size, **facts}
    place = facts["weights_from"]
    weights = f"the weights of {place['repo_id']} at {place['revision']}" if place else "its weights"
    text = f"{args.out}: {size:,} bytes; {facts['model_class']} with {weights}\nNext: dualstream card {args.out}"
    return Result(payload, text)


def export(
    folder: Path,
    base: str,
    *,
    revision: str | None = None,
    decoder: str | None = None,
    compression: str | None = None,
    rope_scaling: str | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Write configuration, code, processor and decoder, and the weights if asked to.

    Args:
        folder: to write.
        base: Hub id of a stock checkpoint; with `whole` also a folder.
        revision: of it; it is pinned as a commit.
        decoder: folder or Hub id of a visual decoder; None: the model reads by a copy of its unembedding.
        compression: what the processor asks for.
        rope_scaling: of the vision tower.
        whole: write the weights too.

    Returns:
        ``model_class``, ``weights_from`` (None if they are written), and what was set.

    Raises:
        ValueError: the base is no Hub id, cannot be reached, is of no supported family or is no stock checkpoint; the
            decoder belongs to another model; a setting is unknown or does not fit the family.
    """
    import torch

    from dualstream.modeling import VisualDecoder, family_of
    from dualstream.processing.processing_visual_decoder import PROCESSOR_CLASSES

    pinned = _revision(base, revision, whole)
    model_class, config = _configured(base, pinned, rope_scaling)
    family = family_of(config).name
    processor = PROCESSOR_CLASSES[family].from_pretrained(base, revision=pinned, compression=compression)
    loaded = None if decoder is None else VisualDecoder.from_pretrained(decoder)
    if loaded is not None:
        config.describe_decoder(loaded)
    with torch.device("meta"):
        model: Any = model_class(config)
    if loaded is not None:
        loaded.check_compatible(model)
    if whole:
        scaling = {} if rope_scaling is None else {"vision_rope_scaling": rope_scaling}
        model = model_class.from_pretrained(base, decoder=loaded, revision=pinned, dtype="auto", **scaling)
        model.save_pretrained(folder)
    else:
        _save_small(model, folder, base, pinned, loaded)
    processor.save_pretrained(folder)
    _copy_records(folder, decoder, base)
    return {
        "model_class": model_class.__name__,
        "weights_from": config.weights_from,
        "decoder": None if loaded is None else loaded.kind,
        "compression": compression,
        "rope_scaling": rope_scaling,
    }


def _revision(base: str, revision: str | None, whole: bool) -> str | None:
    """The commit of a base on the Hub; None for a folder.

    Raises:
        ValueError: the base is neither, or is a folder that whoever loads a small release could not reach.
    """
    local = Path(base).is_dir()
    if not (is_hub_id(base) or local) or (local and not whole):
        raise ValueError(
            f"--base {base!r} must be OWNER/NAME on the Hub, for whoever loads the result needs to reach it; or a "
            "folder, with --whole."
        )
    return None if local else _pinned(base, revision)


def _configured(base: str, pinned: str | None, rope_scaling: str | None) -> tuple[Any, Any]:
    """Our model class for a stock checkpoint, and its configuration.

    Raises:
        ValueError: the family is not supported, the checkpoint is ours already, or its tower has no RoPE to scale.
    """
    from transformers import AutoConfig

    from dualstream.modeling import family_of
    from dualstream.modeling.auto import MODEL_CLASSES, ROPE_SCALED_CLASSES

    stock = AutoConfig.from_pretrained(base, revision=pinned)
    family = family_of(stock).name
    model_class: Any = MODEL_CLASSES[family]
    if stock.model_type == model_class.config_class.model_type:
        raise ValueError(f"--base {base} is a checkpoint of ours already; release it as it is.")
    config = model_class.config_class.from_pretrained(base, revision=pinned)
    if rope_scaling is not None:
        if family not in ROPE_SCALED_CLASSES:
            raise ValueError(f"--rope-scaling {rope_scaling}: the vision tower of a '{family}' model has no RoPE.")
        config.vision_rope_scaling = rope_scaling
    return model_class, config


def _save_small(model: Any, folder: Path, base: str, pinned: str | None, decoder: VisualDecoder | None) -> None:
    """Write code, a configuration that says where the weights are, and the decoder."""
    model.config.weights_from = {"repo_id": base, "revision": pinned}
    model.config._name_or_path = base
    model.save_code(folder)
    if decoder is not None:
        decoder.save_pretrained(folder)


def _copy_records(folder: Path, *sources: str | None) -> None:
    """Copy what is known of the runs that made the decoder and the weights, where these are folders."""
    for source in sources:
        for name in RECORDS:
            if source and (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, folder)


def _pinned(base: str, revision: str | None) -> str:
    """The commit that a revision of a repository stands for.

    Raises:
        ValueError: the Hub cannot be asked, or has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(base, revision=revision).sha)
    except HfHubHTTPError as error:
        raise ValueError(f"--base {base} at {revision or 'main'} is not to be had: {error}") from error
    except Exception as error:  # the HTTP library's own classes, which differ between versions of huggingface_hub
        raise ValueError(f"--base {base}: the Hub cannot be reached: {error}") from error
