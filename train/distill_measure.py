"""Figures of a distilled decoder on held-out pictures, beside the unembedding it started from and a control."""

from __future__ import annotations

from typing import Any

from dualstream.eval.decoder_metrics import (
    BASELINE,
    agreement_figures,
    classes_of,
    estimate_figures,
    read_pictures,
)
from dualstream.modeling import VisualDecoder, family_of, token_tables
from dualstream.modeling.lens import unwrapped

from .distillation_config import DistillationConfig
from .image_dataset import ImageSubset

DECODER, CONTROL = "decoder", "another picture"


def measure(
    model: Any, processor: Any, images: ImageSubset, decoder: VisualDecoder, config: DistillationConfig, depth: int
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Measure agreement with the language model's own map.

    The control reads every picture by the map of the next one. The oracle, the map itself, agrees with itself by
    definition and needs no measuring; what it costs is a second pass of the language model.

    Returns:
        Reader ("decoder", "unembedding", "another picture") -> figure -> estimate over images; the decoder's figures
        have paired differences to the unembedding, ``<figure>_gain``.
    """
    weight = family_of(unwrapped(model)).unembedding(unwrapped(model)).weight
    readers = {BASELINE: VisualDecoder.from_unembedding(weight), DECODER: decoder}
    pictures = (images[index] for index in range(len(images)))
    readings = read_pictures(
        model, processor, pictures, readers, depth, config.final_norm, config.per_device_eval_batch_size
    )
    meaningless, text_class = token_tables(processor.tokenizer, weight.shape[0])
    classes = classes_of(decoder)
    ids = {**readings.students, CONTROL: readings.other_picture()}
    figures = {
        name: agreement_figures(readings, reading, meaningless, text_class, classes) for name, reading in ids.items()
    }
    return {
        name: {
            figure: estimate.to_dict()
            for figure, estimate in estimate_figures(
                values, figures[BASELINE] if name == DECODER else None, config.seed
            ).items()
        }
        for name, values in figures.items()
    }
