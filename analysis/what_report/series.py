"""Readings as a page takes them, from records of depths or from a model that reads now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dualstream.analysis.what.depth_maps import DECODER, NORMED, DepthMaps, Step
from dualstream.analysis.what.reading import make_steps, read_batch
from dualstream.analysis.what.scoring import Lenses
from dualstream.modeling.decoder_tables import token_tables
from dualstream.processing.page_data import shown
from dualstream.processing.reading_series import ReadingPoint, ReadingSeries, plan_methods

if TYPE_CHECKING:
    from PIL.Image import Image

    from dualstream.analysis.annotated_images import AnnotatedImage

TRACKED_WORDS = 24  # words of a page whose probability is known in every cell
GRID_POINTS = 80  # combinations of depths up to which all of them are read
LIKELY = 0.01


class PictureSource(Protocol):
    """Something that has read pictures, or can."""

    @property
    def images(self) -> Sequence[AnnotatedImage]:
        """The pictures."""
        ...

    def series(self, image: AnnotatedImage) -> ReadingSeries:
        """The readings of one of them."""
        ...


class ModelSource:
    """A model that reads pictures when they are asked for.

    Args:
        model: a supported model.
        processor: its processor.
        name: as shown.
        images: the pictures.
        top_k: readings per cell.
        words: word -> vocabulary ids, whose probability is wanted in every cell.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        images: Sequence[AnnotatedImage],
        top_k: int = 5,
        words: dict[str, Sequence[int]] | None = None,
    ) -> None:
        self.processor, self.name, self.images = processor, Path(name).name, images
        self.lenses = Lenses(model, top_k, words)
        rows = len(self.lenses.family.unembedding(self.lenses.model).weight)
        self.tables = token_tables(processor.tokenizer, rows)
        self.steps = report_steps(self.lenses.model)

    def series(self, image: AnnotatedImage) -> ReadingSeries:
        """Read a picture at all depths, shown first at the last of the language model."""
        return self.read(image.image(), words_of(image))

    def read(self, picture: Image, words: Iterable[str] = (), name: str | None = None) -> ReadingSeries:
        """Read any picture; `name` stands for the model where it is not its own."""
        (maps,) = read_batch(self.lenses, self.processor, [picture], self.steps, ["picture"])
        return series_of_maps(maps, name or self.name, self.tables, words=words)


def report_steps(model: Any, most: int = GRID_POINTS) -> tuple[Step, ...]:
    """All combinations of depths; where they are more than `most`, those that touch a model's own path.

    These are all vision depths with the connector and the last depth of the language model, and all depths of the
    language model with the vision depth that the model itself reads.
    """
    from dualstream.modeling.vision_depths import native_vision_depth

    grid = make_steps(model)
    if len(grid) <= most:
        return grid
    native = native_vision_depth(model)
    last = max(step.llm_depth for step in grid if step.llm_depth is not None)
    return tuple(step for step in grid if step.vision_depth == native or step.llm_depth in (None, last))


def series_of_maps(
    maps: DepthMaps,
    name: str,
    tables: tuple[Any, Any],
    llm_depth: int | None = None,
    words: Iterable[str] = (),
) -> ReadingSeries:
    """Readings by depth as a page takes them.

    Args:
        maps: the readings.
        name: of the model.
        tables: ``meaningless`` and ``text_class`` of its vocabulary, for the compressions.
        llm_depth: depth of the language model that is shown first, at the native vision depth; None: the last.
        words: tracked words that the page must know; the likeliest of the others join them.
    """
    return ReadingSeries(
        name=shown(name),
        points=tuple(ReadingPoint(step.vision_depth, step.llm_depth, lens_name(step)) for step in maps.steps),
        ids=maps.ids,
        pieces=maps.pieces,
        geometry=maps.geometry,
        scores=maps.log_probs,
        start=_first_shown(maps, llm_depth),
        native_vision=maps.native_vision_depth,
        plans=plan_methods(maps.ids, maps.geometry.grids, tables),
        tracked=tracked_words(maps, words),
    )


def lens_name(step: Step) -> str:
    """What tells steps of equal depths apart; nothing at the connector as the model reads it."""
    names = [] if step.lens == DECODER else [step.lens]
    return ", ".join([*names, *(["norm-matched"] if step.norm_matched else [])])


def tracked_words(maps: DepthMaps, wanted: Iterable[str], most: int = TRACKED_WORDS) -> dict[str, np.ndarray]:
    """Word -> (S, N) log-probabilities: those tracked and wanted, then the likeliest; `most` in all.

    A word that is nowhere likelier than 1 % is left out unless it is wanted.
    """
    if maps.tracked is None or not maps.words:
        return {}
    wanted, peaks = set(wanted), maps.tracked.max(axis=(0, 1))
    order = sorted(range(len(maps.words)), key=lambda at: (maps.words[at] not in wanted, -peaks[at], at))
    likely = [at for at in order if maps.words[at] in wanted or peaks[at] > np.log(LIKELY)]
    return {maps.words[at]: maps.tracked[:, :, at] for at in likely[:most]}


def _first_shown(maps: DepthMaps, llm_depth: int | None) -> int:
    native = [
        (step.llm_depth, number)
        for number, step in enumerate(maps.steps)
        if (step.vision_depth, step.lens, step.norm_matched) == (maps.native_vision_depth, NORMED, False)
        and step.llm_depth is not None
    ]
    chosen = [number for depth, number in native if depth == llm_depth]
    return chosen[0] if chosen else max(native)[1] if native else 0


def words_of(image: AnnotatedImage) -> set[str]:
    """Names and attributes of the objects of a picture."""
    return {word for item in image.objects for word in (item.name, *item.attributes)}
