"""Accuracy on held-out questions of prompts that different decoders compress, on the same questions.

The oracle compresses by the language model's own map, which costs a second pass through the language model: what a
decoder that always agreed with it would score. The control compresses by the language model's map of *another*
picture: runs of the usual number and lengths at places that have nothing to do with the picture. A decoder whose
accuracy is not above the control's reads nothing that matters for these questions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.visual_decoder import VisualDecoder

from .decoder_metrics import BASELINE, DecoderReadings, read_batch
from .scene_questions import FULL, Arm, Item, answer_arms

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

ORACLE = "llm map"
CONTROL_MAP = "other picture's map"


class GivenReadings(VisualDecoder):
    """A decoder whose readings are given: it looks at the number of features only.

    Attributes:
        readings: (N, m) long, best first, of the cells it will be asked for, in their order.
    """

    readings: torch.Tensor

    @classmethod
    def for_model(cls, model: PreTrainedModel, tokenizer: Any | None = None) -> GivenReadings:
        """Make a decoder that passes for one of this model: its matrix is the model's own, and is never applied."""
        inner: Any = unwrapped(model)
        decoder: Any = cls.from_unembedding(family_of(inner).unembedding(inner).weight, tokenizer)
        return decoder

    def giving(self, readings: torch.Tensor) -> GivenReadings:
        """Return a decoder with the same tables and other readings, (N, m) long."""
        decoder = copy.copy(self)
        decoder.readings = readings
        return decoder

    def top_k(
        self,
        features: torch.Tensor,
        k: int = 1,
        unembedding: torch.Tensor | None = None,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """Return the first k given readings of every feature, (N, k) long.

        Raises:
            ValueError: there are not as many features as readings, or fewer than k readings per cell.
        """
        cells, given = self.readings.shape
        if features.shape[0] != cells or not 1 <= k <= given:
            raise ValueError(
                f"{given} readings of {cells} cells were given, but {k} of {features.shape[0]} cells are asked for."
            )
        return self.readings[:, :k].to(features.device)


def llm_map_decoder(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image],
    depth: int | None = None,
    final_norm: bool = True,
    of_next_image: bool = False,
) -> Callable[[int, int], VisualDecoder]:
    """Make the oracle: decoders that read what the language model reads at some depth.

    Args:
        model: a supported VLM.
        processor: its processor.
        images: all pictures that will be asked about, in order.
        depth: language-model blocks run before reading; None: all.
        final_norm: whether the states pass the final norm.
        of_next_image: the control: read every picture by the map of the next one (the last by the first's),
            stretched to its own grid.

    Returns:
        A function (first, end) -> decoder of the pictures first..end-1, as ``Arm.decoder_for`` needs.
    """
    decoder = GivenReadings.for_model(model, processor.tokenizer)

    def decoder_for(first: int, end: int) -> VisualDecoder:
        batch = images[first:end]
        if of_next_image:
            batch = [*batch, images[end % len(images)]]
        read = read_batch(model, processor, batch, teacher_depth=depth, final_norm=final_norm)
        return decoder.giving(_of_next_image(read) if of_next_image else read.teacher)

    return decoder_for


def _of_next_image(readings: DecoderReadings) -> torch.Tensor:
    """Readings of all pictures but the last, each by the map of the picture after it."""
    last = readings.image_index == readings.image_index.max()
    return readings.other_picture()[: int(readings.grids[~last].prod(-1).sum())]


def _always(decoder: VisualDecoder) -> Callable[[int, int], VisualDecoder]:
    return lambda first, end: decoder


def answer_with_decoders(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: list[Item],
    decoders: Mapping[str, VisualDecoder],
    method: str = "rle",
    teacher_depth: int | None = None,
    final_norm: bool = True,
    batch_size: int = 50,
) -> list[dict[str, Any]]:
    """Answer every item from the full prompt and from prompts compressed by every decoder, the oracle and the control.

    Args:
        model: a supported VLM.
        processor: its processor.
        items: the questions.
        decoders: name -> decoder; the plain unembedding is added under ``unembedding`` unless it is there.
        method: the compression.
        teacher_depth: of the oracle; None: all blocks.
        final_norm: of the oracle.
        batch_size: questions per ``generate`` call.

    Returns:
        One row per item and arm, see ``answer_arm``; for ``summarize(rows, references=(FULL, BASELINE, ORACLE))``.

    Raises:
        ValueError: a decoder has the name of an arm that is added.
    """
    taken = {FULL, ORACLE, CONTROL_MAP} & decoders.keys()
    if taken:
        raise ValueError(f"a decoder cannot be called {taken.pop()!r}: that is the name of an arm of its own.")
    inner: Any = unwrapped(model)
    baseline = VisualDecoder.from_unembedding(family_of(inner).unembedding(inner).weight)
    images = [item.image for item in items]
    arms = [Arm(FULL)]
    for name, decoder in ({BASELINE: baseline} | dict(decoders)).items():
        arms.append(Arm(name, method, decoder_for=_always(decoder.with_token_tables(processor.tokenizer))))
    for name, of_next_image in ((ORACLE, False), (CONTROL_MAP, True)):
        maps = llm_map_decoder(model, processor, images, teacher_depth, final_norm, of_next_image)
        arms.append(Arm(name, method, decoder_for=maps))
    return answer_arms(model, processor, items, arms, batch_size)
