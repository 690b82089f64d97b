"""What the cells of an object read as, at every depth of the language model: rows of a picture.

The reading is the logit lens with the final norm applied once, at the last depth as at every other, so that the last
depth is the model's own prediction (the public code of arXiv 2410.07149 norms it twice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from dualstream.analysis.annotated_images import AnnotatedImage
from dualstream.analysis.object_tokens import object_tokens, translated_control
from dualstream.eval.hallucination import singulars
from dualstream.modeling import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.lens_depths import read_states, visit_depths
from dualstream.processing import build_inputs, token_geometry
from dualstream.processing.words import decode_pieces

from ..scorers import ClassWords
from ..targets import stated_area

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

PROMPT = "Describe the image."  # behind the image, so it does not change what the cells read as
SHORTEST_PIECE = 3  # letters that the first piece of a word needs to count for it
CELLS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "depth": pa.int32(),
        "n_visual": pa.int32(),
        "objects": pa.list_(pa.string()),
        "cells": pa.list_(CELLS),
        "same_name": pa.list_(CELLS),
        "moved": pa.list_(CELLS),
        "top1": CELLS,
        "log_p": pa.list_(pa.list_(pa.float32())),
    }
)


@dataclass(frozen=True)
class ClassIds:
    """Vocabulary ids that read as a class.

    Attributes:
        whole: entries that are the whole word, in any case, with or without a leading blank, in either number.
        piece: these, and entries of at least ``SHORTEST_PIECE`` letters that the word starts with.
    """

    whole: tuple[int, ...]
    piece: tuple[int, ...]


class ClassVocabulary:
    """Which entries of a vocabulary read as which class.

    Args:
        tokenizer: of the model.
        size: entries of the output matrix.
        synonyms: class -> other names that count.
    """

    def __init__(self, tokenizer: Any, size: int, synonyms: dict[str, tuple[str, ...]] | None = None) -> None:
        pieces = decode_pieces(tokenizer, np.arange(size))
        special = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        self.synonyms = synonyms or {}
        self._entries: dict[str, list[int]] = {}
        for number, piece in pieces.items():
            word = piece.strip().casefold()
            if word and number not in special:
                self._entries.setdefault(word, []).append(number)
        self._known: dict[str, ClassIds] = {}

    def ids(self, name: str) -> ClassIds:
        """Entries for a class; both sets may be empty."""
        if name not in self._known:
            words = ClassWords(name, self.synonyms.get(name, ()))
            names = {" ".join(phrase) for phrase in words.phrases}
            whole = [i for word, ids in self._entries.items() if names & set(singulars(word)) for i in ids]
            piece = [
                i
                for word, ids in self._entries.items()
                if len(word) >= SHORTEST_PIECE and any(full.startswith(word) for full in names)
                for i in ids
            ]
            self._known[name] = ClassIds(tuple(sorted(whole)), tuple(sorted({*whole, *piece})))
        return self._known[name]


@dataclass(frozen=True)
class Cells:
    """The cells of one object and those it is compared with.

    Attributes:
        own: covered at least to the share asked for.
        same_name: touched by any object of the same name; no cell of these is an outside cell.
        moved: a copy of ``own`` elsewhere, of the same size and shape; empty where none fits.
    """

    own: np.ndarray
    same_name: np.ndarray
    moved: np.ndarray


def object_cells(
    image: AnnotatedImage,
    processor: ProcessorMixin,
    size: tuple[int, int],
    min_coverage: float,
    seed: int = 0,
    area: tuple[float, float] | None = None,
) -> list[tuple[str, Cells]]:
    """The cells of every object of a picture but crowd regions; an object may have none.

    Args:
        image: with its objects.
        processor: tells the geometry.
        size: (width, height) of the picture.
        min_coverage: share of a cell that the object must cover.
        seed: of the moved copies.
        area: bounds in square pixels, excluded; objects of another area are left out.
    """
    geometry = token_geometry(processor, size)
    touched: dict[str, set[int]] = {}
    for item in image.objects:
        touched.setdefault(item.name, set()).update(object_tokens(geometry, item.mask, item.box).tolist())
    found = []
    for number, item in enumerate(image.objects):
        if item.is_crowd or (area and not area[0] < stated_area(item) < area[1]):
            continue
        own = object_tokens(geometry, item.mask, item.box, min_coverage)
        same = np.array(sorted(touched[item.name]), dtype=np.int64)
        moved = translated_control(geometry, own, same, seed, f"{image.name} {number}") if len(own) else []
        found.append((item.name, Cells(own, same, moved[0] if moved else np.array([], dtype=np.int64))))
    return found


def lens_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[AnnotatedImage],
    vocabulary: ClassVocabulary,
    min_coverage: float = 0.5,
    seed: int = 0,
    area: tuple[float, float] | None = None,
) -> list[list[dict[str, Any]]]:
    """Read a batch of pictures at every depth.

    Args:
        model: a supported model.
        processor: its processor.
        images: the batch.
        vocabulary: of the model.
        min_coverage: share of a cell that an object must cover.
        seed: of the moved copies.
        area: see ``object_cells``.

    Returns:
        Per picture one row per depth 0..L as ``SCHEMA``: the most likely entry of every cell (``top1``, of all N
        cells), and per object its cells, control cells, and the log-probability in nats that all N cells give to the
        class (``log_p``: the sum over whole-word entries, or over pieces where there is no whole word; -inf where the
        vocabulary has neither).

    Raises:
        ValueError: geometry and features disagree, or a picture cannot be read.
    """
    inner: Any = unwrapped(model)
    pictures = [image.image() for image in images]
    inputs = build_inputs(processor, pictures, [PROMPT] * len(images)).to(inner.device)
    inputs.pop("compression", None)
    objects = [
        object_cells(image, processor, picture.size, min_coverage, seed, area)
        for image, picture in zip(images, pictures, strict=True)
    ]
    names = sorted({name for found in objects for name, _ in found})
    read, sizes = read_depths(inner, inputs, [vocabulary.ids(name) for name in names], len(images))
    check_sizes(processor, pictures, sizes)
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [
        _rows_of(image.name, found, names, [(top1[span], log_p[:, span]) for top1, log_p in read])
        for image, found, span in zip(images, objects, spans, strict=True)
    ]


def read_depths(
    model: Any, inputs: Any, classes: Sequence[ClassIds], count: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """Read the cells of a batch after every block of the language model.

    Args:
        model: a supported model, without wrappers.
        inputs: of its processor.
        classes: C classes.
        count: pictures of the batch.

    Returns:
        Per depth 0..L the most likely entry of every cell, (N,) int64, and the log-probabilities of the classes,
        (C, N) float32, the pictures one after the other; and how many cells each picture has.
    """
    read: list[tuple[np.ndarray, np.ndarray]] = []

    def look(depth: int | None, states: torch.Tensor) -> None:
        assert depth == len(read)
        ids, scores = read_states(model, states, depth)
        log_p = class_log_probabilities(model, states, ids[:, 0], scores[:, 0], classes)
        read.append((ids[:, 0].cpu().numpy(), log_p.cpu().numpy()))

    depths = list(range(len(family_of(model).llm_blocks(model)) + 1))
    grids, image_index = visit_depths(model, inputs, depths, look)
    sizes = np.bincount(image_index.numpy(), weights=grids.prod(-1).numpy(), minlength=count).astype(int)
    return read, sizes.tolist()


def _rows_of(
    image: str, found: list[tuple[str, Cells]], names: list[str], read: list[tuple[np.ndarray, np.ndarray]]
) -> list[dict[str, Any]]:
    """The rows of one picture, from what its own cells read as at every depth."""
    shared = {
        "image": image,
        "n_visual": len(read[0][0]),
        "objects": [name for name, _ in found],
        "cells": [cells.own for _, cells in found],
        "same_name": [cells.same_name for _, cells in found],
        "moved": [cells.moved for _, cells in found],
    }
    return [
        {**shared, "depth": depth, "top1": top1, "log_p": [log_p[names.index(name)] for name, _ in found]}
        for depth, (top1, log_p) in enumerate(read)
    ]


def check_sizes(processor: ProcessorMixin, pictures: Sequence[Image], sizes: Sequence[int]) -> None:
    """Make sure that the processor's geometry has as many tokens per picture as the model has features.

    Raises:
        ValueError: naming both numbers.
    """
    for picture, size in zip(pictures, sizes, strict=True):
        expected = len(token_geometry(processor, picture.size))
        if expected != size:
            raise ValueError(
                f"a picture of {picture.width} x {picture.height} pixels has {size} features in the model but "
                f"{expected} tokens by its processor; the geometry of this checkpoint is not known."
            )


def class_log_probabilities(
    model: PreTrainedModel, states: torch.Tensor, best: torch.Tensor, scores: torch.Tensor, classes: Sequence[ClassIds]
) -> torch.Tensor:
    """Log-probability that states give to classes, without the scores of the whole vocabulary.

    Args:
        model: the states' model.
        states: (N, d), normed.
        best: (N,) their most likely entries.
        scores: (N,) log-probabilities of these.
        classes: C classes.

    Returns:
        (C, N) float32, -inf for a class without entries.
    """
    head = family_of(model).unembedding(model)
    weight, bias = head.weight, head.bias
    states = states.float().to(weight.device)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found = weight[ids.to(weight.device)].float()
        return found if bias is None else torch.cat([found, bias[ids.to(weight.device)].float()[:, None]], dim=1)

    ones = states if bias is None else torch.cat([states, states.new_ones(len(states), 1)], dim=1)
    normalizer = (ones * logits(best)).sum(1) - scores.to(weight.device)
    result = states.new_full((len(classes), len(states)), -torch.inf)
    for number, entries in enumerate(classes):
        ids = entries.whole or entries.piece
        if ids:
            result[number] = (ones @ logits(torch.tensor(ids)).T).logsumexp(1) - normalizer
    return result
