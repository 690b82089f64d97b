"""How well a visual decoder says, before the language model runs, what the language model would read.

The teacher is the language model's own token map (the logit lens after some depth), the student a decoder of connector
features, the baseline the plain unembedding on the same features. Figures are per image, so that intervals are taken
over images and differences are paired.

Two readings are compared under a key. Without a suffix a figure compares stripped texts (``text_class``), as a person
reading the map would; ``_by_id`` compares vocabulary ids, as the compression does by default; ``_by_class`` compares
the classes of a pruned decoder, to which the teacher's ids are mapped first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.visual_decoder import VisualDecoder, token_tables, top_k_tokens

from .reading_agreement import STUDENT_READINGS, TEACHER_READINGS, ImageCells, reading_agreement
from .statistics import Estimate, bootstrap_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

BASELINE = "unembedding"
GAIN = "_gain"  # suffix of a paired difference to the baseline
BY_ID, BY_CLASS = "_by_id", "_by_class"


@dataclass
class DecoderReadings:
    """What several decoders and the language model read in the same pictures.

    Attributes:
        students: name -> (N, k) long on the CPU.
        teacher: (N, 2) long on the CPU, the language model's two best.
        grids: (n_blocks, 2) long on the CPU.
        image_index: (n_blocks,) long on the CPU.
    """

    students: dict[str, torch.Tensor]
    teacher: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor

    def other_picture(self) -> torch.Tensor:
        """The control: every image read by the language model's map of the next image.

        Returns:
            (N, 2) long; block j of an image shows block j of the next one (cyclically), stretched to its own grid.
        """
        sizes = self.grids.prod(-1)
        first = sizes.cumsum(0) - sizes
        images = self.image_index.unique_consecutive(return_inverse=True)[1]
        blocks_of = [(images == image).nonzero().flatten().tolist() for image in range(int(images.max()) + 1)]
        parts = []
        for image, blocks in enumerate(blocks_of):
            others = blocks_of[(image + 1) % len(blocks_of)]
            for j, block in enumerate(blocks):
                other = others[j % len(others)]
                cells = stretched_cells(self.grids[other].tolist(), self.grids[block].tolist())
                parts.append(self.teacher[first[other] + cells])
        return torch.cat(parts)


def stretched_cells(source: list[int], target: list[int]) -> torch.Tensor:
    """(h * w,) long: for every cell of a target grid (h, w) the cell of a source grid at the same relative place."""
    rows, columns = (
        (torch.arange(size) * 2 + 1) * length // (2 * size) for size, length in zip(target, source, strict=True)
    )
    return (rows[:, None] * source[1] + columns).flatten()


def read_pictures(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image],
    decoders: Mapping[str, VisualDecoder],
    teacher_depth: int | None = None,
    final_norm: bool = True,
    batch_size: int = 16,
) -> DecoderReadings:
    """Read pictures by several decoders and by the language model, with one pass of the vision tower.

    Args:
        model: a supported VLM.
        processor: its processor.
        images: RGB images; at least one.
        decoders: name -> decoder of this model.
        teacher_depth: language-model blocks the teacher runs; None: all of them.
        final_norm: whether the teacher's states pass the final norm.
        batch_size: images at a time.

    Returns:
        All readings, on the CPU.

    Raises:
        ValueError: no images, batch_size below 1, or a decoder of another model.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    for decoder in decoders.values():
        decoder.check_compatible(unwrapped(model))
    batches = _batches(tqdm(images, desc="pictures", unit="image", disable=None), batch_size)
    parts = [read_batch(model, processor, batch, decoders, teacher_depth, final_norm) for batch in batches]
    if not parts:
        raise ValueError("images must hold at least one picture.")
    return _joined(parts)


@torch.no_grad()
def read_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image],
    decoders: Mapping[str, VisualDecoder] = MappingProxyType({}),
    teacher_depth: int | None = None,
    final_norm: bool = True,
) -> DecoderReadings:
    """Read one batch of pictures; see ``read_pictures``. By causality no prompt changes what is read."""
    from dualstream.modeling.lens import image_features_and_states
    from dualstream.processing import build_inputs
    from dualstream.processing.inference import READING_PROMPT

    inner: Any = unwrapped(model)
    family = family_of(inner)
    head = family.unembedding(inner)
    depth = len(family.llm_blocks(inner)) if teacher_depth is None else teacher_depth
    inputs = build_inputs(processor, images, [READING_PROMPT] * len(images)).to(inner.device)
    inputs.pop("compression", None)
    features, states, grids = image_features_and_states(inner, inputs, depth)
    states = family.final_norm(inner)(states) if final_norm else states
    students = {
        name: decoder.top_k(features, min(STUDENT_READINGS, decoder.num_classes), unembedding=head.weight).cpu()
        for name, decoder in decoders.items()
    }
    teacher, _ = top_k_tokens(states, head.weight, TEACHER_READINGS, bias=head.bias)
    image_index = family.image_of_block(inner, inputs, grids, inputs["input_ids"])
    return DecoderReadings(students, teacher.cpu(), grids, image_index)


def _batches(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
    batch: list[Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _joined(parts: list[DecoderReadings]) -> DecoderReadings:
    offset, shifted = 0, []
    for part in parts:
        shifted.append(replace(part, image_index=part.image_index + offset))
        offset += int(part.image_index.max()) + 1
    return DecoderReadings(
        {name: torch.cat([part.students[name] for part in parts]) for name in parts[0].students},
        torch.cat([part.teacher for part in parts]),
        torch.cat([part.grids for part in parts]),
        torch.cat([part.image_index for part in shifted]),
    )


def agreement_figures(
    readings: DecoderReadings,
    student_ids: torch.Tensor,
    meaningless: torch.Tensor,
    text_class: torch.Tensor,
    classes: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """All figures of one student: plain (by text), ``_by_id``, and ``_by_class`` when classes are given.

    Args:
        readings: gives teacher and grids.
        student_ids: (N, k) long.
        meaningless: (V,) bool.
        text_class: (V,) long.
        classes: (V,) long, class of every vocabulary id under a pruned decoder.

    Returns:
        Name -> (n_images,); see ``reading_agreement``.
    """
    keys = {"": text_class, BY_ID: None} | ({} if classes is None else {BY_CLASS: classes})
    figures: dict[str, np.ndarray] = {}
    for suffix, key in keys.items():
        found = reading_agreement(
            student_ids,
            readings.teacher,
            readings.grids,
            image_index=readings.image_index,
            meaningless=meaningless,
            key=key,
        )
        # Whether a token means anything does not depend on what it is compared with.
        figures |= {name + suffix: values for name, values in found.items() if not suffix or name != "meaningless_f1"}
    return figures


def estimate_figures(
    figures: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray] | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """Means over images with bootstrap intervals, and paired differences to a baseline on the same images.

    Args:
        figures: name -> (n_images,).
        baseline: the same figures of the baseline; for every one it has, ``<name>_gain`` is added.
        seed: of the resampling.

    Returns:
        Name -> estimate.
    """
    estimates = {name: bootstrap_mean(values, seed) for name, values in figures.items()}
    for name in [name for name in figures if name in (baseline or {})]:
        estimates[name + GAIN] = bootstrap_mean(figures[name] - baseline[name], seed)  # type: ignore[index]
    return estimates


def measure_decoder(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image],
    decoder: VisualDecoder,
    teacher_depth: int | None = None,
    final_norm: bool = True,
    batch_size: int = 16,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Measure one decoder against the language model's own map, and against the plain unembedding.

    Args:
        model: a supported VLM.
        processor: its processor, with tokenizer.
        images: RGB images; the units of the intervals.
        decoder: the decoder to measure.
        teacher_depth: language-model blocks the teacher runs; None: all of them.
        final_norm: whether the teacher's states pass the final norm.
        batch_size: images at a time.
        seed: of the bootstrap.

    Returns:
        The figures of ``reading_agreement`` (by text), with ``_by_id`` and, for a pruned decoder, ``_by_class``; each
        also with ``_gain``, the paired difference to the plain unembedding. A pruned decoder has ``other_share`` too:
        cells whose true reading it can only call "other".
    """
    inner: Any = unwrapped(model)
    weight = family_of(inner).unembedding(inner).weight
    decoders = {BASELINE: VisualDecoder.from_unembedding(weight), "decoder": decoder}
    readings = read_pictures(model, processor, images, decoders, teacher_depth, final_norm, batch_size)
    tables = token_tables(processor.tokenizer, weight.shape[0])
    classes = classes_of(decoder)
    baseline, figures = (
        agreement_figures(readings, readings.students[name], *tables, classes) for name in (BASELINE, "decoder")
    )
    if classes is not None:
        figures["other_share"] = other_share(readings, decoder)
    return estimate_figures(figures, baseline, seed)


def classes_of(decoder: VisualDecoder) -> torch.Tensor | None:
    """(V,) long on the CPU: class of every vocabulary id, None for a decoder whose classes are the vocabulary."""
    if decoder.kind != "pruned":
        return None
    return decoder.classes_of_tokens(torch.arange(decoder.vocab_size)).long().cpu()


def other_share(readings: DecoderReadings, decoder: VisualDecoder) -> np.ndarray:
    """(n_images,): share of cells whose teacher reading falls into a pruned decoder's last class, "other"."""
    classes = classes_of(decoder)
    if classes is None:
        raise ValueError(f"only a pruned decoder has the class 'other', this one is {decoder.kind!r}.")
    cells = ImageCells.of(readings.grids, readings.image_index)
    return cells.mean(classes[readings.teacher[:, 0]] == decoder.num_classes - 1)
