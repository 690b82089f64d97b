"""Pictures for training and validation: told apart by their content, shuffled by seed, batched for any processor."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from dualstream.data_builders.token_maps.images import image_hash
from dualstream.eval.manifest import write_json

from .distillation_config import DistillationConfig
from .image_sources import NumberedImages, open_images

logger = logging.getLogger(__name__)
NOTHING = -1  # fills the last batch of an epoch; becomes no image
HASHING_THREADS = 4


class Images(Protocol):
    """Numbered RGB pictures, e.g. a list."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def __getitem__(self, index: int, /) -> Image:
        """Return a picture."""


class ImageSubset(Dataset):
    """Some pictures of a source.

    Attributes:
        source: the source.
        indices: the chosen pictures.
        hashes: their content hashes.
    """

    def __init__(self, source: NumberedImages, indices: list[int], hashes: list[str]) -> None:
        self.source, self.indices, self.hashes = source, indices, hashes

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Image:
        """Open a picture as RGB."""
        return self.source[self.indices[index]]

    def fingerprint(self) -> str:
        """SHA-256 over the sorted content hashes: equal for equal sets of pictures."""
        return hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()


@dataclass
class ImageSets:
    """The pictures of a run.

    Attributes:
        train: shares no picture with the other two.
        validation: shares no picture with `test`.
        test: None if none was asked for.
        report: for each, its source and how many pictures were used, left out and unreadable.
    """

    train: ImageSubset
    validation: ImageSubset
    test: ImageSubset | None
    report: dict[str, dict[str, Any]]


def load_image_sets(config: DistillationConfig, cache: Path | None = None) -> ImageSets:
    """Open, hash and separate the pictures of a run.

    Args:
        config: names the sources and the limits.
        cache: folder that keeps the hashes, so that a run that is continued does not decode everything again.

    Returns:
        Three sets without a common picture. Where validation images are not given, they are the training images of the
        smallest hashes: a choice that no order of files and no seed can change.

    Raises:
        ValueError: a source is missing, an image unreadable under ``unreadable_images="error"``, or no image is left.
    """
    named = {"test": config.test_images, "validation": config.eval_images, "train": config.train_images}
    limits = {"test": None, "validation": config.num_eval_images, "train": None}
    taken: set[str] = set()
    sets: dict[str, ImageSubset] = {}
    report: dict[str, dict[str, Any]] = {}
    for role, name in named.items():
        if name is None:
            continue
        readable, unreadable = _readable(role, name, config, cache)
        report[role] = {"unreadable": unreadable, "left_out": sum(digest in taken for digest in readable.hashes)}
        sets[role] = _without(readable, taken, limits[role])
        taken |= set(sets[role].hashes)
    if "validation" not in sets:
        pool = sets["train"]
        sets["validation"], sets["train"] = _hold_out(pool, config.num_eval_images)
        report["validation"] = {"unreadable": 0, "left_out": 0}
        report["train"]["left_out"] += len(pool) - len(sets["train"])
    if config.max_train_images is not None:
        sets["train"] = _without(sets["train"], set(), config.max_train_images)
    for role, images in sets.items():
        if not len(images):
            raise ValueError(f"no {role} images are left of {named[role] or named['train']!r}: {report[role]}.")
        report[role] |= {"source": images.source.name, "images": len(images), "fingerprint": images.fingerprint()}
    return ImageSets(sets["train"], sets["validation"], sets.get("test"), report)


def _readable(role: str, name: str, config: DistillationConfig, cache: Path | None) -> tuple[ImageSubset, int]:
    """The readable pictures of a source and the number of the others."""
    source = open_images(name, config.image_split, config.image_column)
    hashes = _cached_hashes(source, None if cache is None else cache / f"images_{role}.json")
    bad = [index for index, digest in enumerate(hashes) if digest is None]
    if bad:
        shown = ", ".join(source.name_of(index) for index in bad[:3])
        message = (
            f"{len(bad)} of {len(hashes)} images of {source.name} cannot be read ({shown}{', ...' * (len(bad) > 3)})"
        )
        if config.unreadable_images == "error":
            raise ValueError(f"{message}; unreadable_images=skip would leave them out.")
        logger.warning("%s and are left out.", message)
    good = [index for index, digest in enumerate(hashes) if digest is not None]
    return ImageSubset(source, good, [str(hashes[index]) for index in good]), len(bad)


def _cached_hashes(source: NumberedImages, path: Path | None) -> list[str | None]:
    """Content hash of every picture, None where it cannot be read; from the file if it is of this source."""
    if path is not None and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["source"] == source.name and len(stored["hashes"]) == len(source):
            return stored["hashes"]

    def digest(index: int) -> str | None:
        try:
            return image_hash(source[index])
        except (ValueError, OSError):
            return None

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        bar = tqdm(pool.map(digest, range(len(source))), "images", len(source), unit="image", disable=None)
        hashes = list(bar)
    if path is not None:
        write_json(path, {"source": source.name, "hashes": hashes})
    return hashes


def _without(images: ImageSubset, taken: set[str], limit: int | None = None) -> ImageSubset:
    chosen = [place for place, digest in enumerate(images.hashes) if digest not in taken][:limit]
    return ImageSubset(images.source, [images.indices[i] for i in chosen], [images.hashes[i] for i in chosen])


def _hold_out(images: ImageSubset, count: int) -> tuple[ImageSubset, ImageSubset]:
    """`count` pictures of the smallest hashes, one of each, and all others."""
    held = set(sorted(set(images.hashes))[: min(count, len(images) // 2)])
    first = {digest: place for place, digest in reversed(list(enumerate(images.hashes)))}
    chosen = sorted(first[digest] for digest in held)
    return (
        ImageSubset(images.source, [images.indices[i] for i in chosen], [images.hashes[i] for i in chosen]),
        _without(images, held),
    )


class PaddedImages(Dataset):
    """Pictures, and None at the place ``NOTHING``."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> Image | None:
        """Return a picture or None."""
        return None if index == NOTHING else self.images[index]


class EpochSampler(Sampler[int]):
    """A fresh order for every epoch that depends on seed and epoch alone, filled up to whole batches of all processes.

    Filling up with nothing, instead of dropping or repeating pictures, makes every way of splitting a batch over
    processes and accumulation steps see the same pictures in the same updates.

    Attributes:
        epoch: the epoch whose order comes next.

    Args:
        count: number of pictures.
        multiple: the length is filled up to a multiple of it.
        seed: of the orders; None keeps the pictures in their order.
    """

    def __init__(self, count: int, multiple: int, seed: int | None = None) -> None:
        self.count, self.multiple, self.seed, self.epoch = count, multiple, seed, 0

    def __len__(self) -> int:
        """Return the number of places, filled up."""
        return -(-self.count // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the pictures, then ``NOTHING``."""
        order = list(range(self.count))
        if self.seed is not None:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        yield from order
        yield from [NOTHING] * (len(self) - self.count)


class ImageCollator:
    """Turn pictures into the inputs of a model whose prompt ends with the image.

    Args:
        processor: a VLM processor with a chat template.

    Raises:
        ValueError: the processor has no chat template, or its template shows no image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.prompt = processor, image_prompt(processor)

    def __call__(self, images: list[Image | None]) -> dict[str, torch.Tensor]:
        """Return the model's inputs; without a picture, only empty ``input_ids``."""
        present = [[image] for image in images if image is not None]
        if not present:
            return {"input_ids": torch.zeros(0, 0, dtype=torch.long)}
        batch = self.processor(
            images=present, text=[self.prompt] * len(present), return_tensors="pt", padding=True, padding_side="left"
        )
        batch.pop("compression", None)
        return dict(batch)


def image_prompt(processor: Any) -> str:
    """Return the chat template's text up to and including the image placeholder.

    Raises:
        ValueError: the processor has no chat template, or its template shows no image.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("processor has no chat template: use an instruction-tuned checkpoint, or set one.")
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    before, placeholder, _ = text.rpartition(processor.image_token)
    if not placeholder:
        raise ValueError(f"the chat template writes no {processor.image_token} for an image; it writes {text!r}.")
    return before + placeholder
