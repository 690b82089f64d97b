"""Many conditions of the same prompts as rows of one batch: pictures are encoded once, their features repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dualstream.analysis.interventions import ENCODER_OUTPUTS
from dualstream.modeling.compression_report import feature_output
from dualstream.modeling.families import family_of, flatten_features

PER_ROW = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def prompt_rows(model: nn.Module, inputs: Any, output: Any, index: Sequence[int]) -> dict[str, Any]:
    """Model inputs whose row i is row ``index[i]`` of the given ones, with images that are encoded already.

    Args:
        model: a supported model, not wrapped.
        inputs: (B, L) prompts with one image each, as the processor returned them.
        output: of ``get_image_features`` for them; left as it is.
        index: rows wanted, in any order, repeated at will.

    Returns:
        Inputs of ``forward`` and ``generate`` with ``mm_encoder_outputs`` in place of pixels.

    Raises:
        ValueError: if a prompt does not hold exactly one image, or holds something that is not repeated here.
    """
    ids, chosen = inputs["input_ids"], torch.as_tensor(list(index), dtype=torch.long)
    sizes = visual_counts(model, inputs)
    rows: dict[str, Any] = {name: inputs[name][chosen] for name in PER_ROW if inputs.get(name) is not None}
    if inputs.get("image_grid_thw") is not None:
        if len(inputs["image_grid_thw"]) != len(ids):
            raise ValueError(
                f"every prompt needs one image: {len(ids)} prompts, {len(inputs['image_grid_thw'])} images"
            )
        rows["image_grid_thw"] = inputs["image_grid_thw"][chosen]

    def pick(value: Any) -> Any:
        parts = flatten_features(value).split(sizes)
        found = [parts[row] for row in index]
        return torch.cat(found)[None] if isinstance(value, torch.Tensor) else found

    return {**rows, ENCODER_OUTPUTS: {"image": feature_output(output, pick)}}


def visual_counts(model: nn.Module, inputs: Any) -> list[int]:
    """Visual tokens of every row; each must hold some.

    Raises:
        ValueError: a row has none.
    """
    counts = (inputs["input_ids"] == family_of(model).image_token_id(model.config)).sum(-1).tolist()
    if 0 in counts:
        raise ValueError(f"row {counts.index(0)} holds no image; every prompt of an experiment needs one.")
    return counts


def feature_layers(output: Any) -> list[tuple[str, int, torch.Tensor]]:
    """Stage, number and flat (N, d) values of the connector output and every deepstack layer."""
    layers = [("connector", 0, flatten_features(output.pooler_output))]
    for number, layer in enumerate(getattr(output, "deepstack_features", None) or []):
        layers.append(("deepstack", number, flatten_features(layer)))
    return layers


def with_layers(output: Any, layers: Sequence[torch.Tensor], sizes: Sequence[int]) -> Any:
    """An encoder output of the same type with other values: one (N, d) tensor per layer, rows of `sizes` tokens."""
    values = iter(layers)

    def put(value: Any) -> Any:
        new = next(values)
        return new[None] if isinstance(value, torch.Tensor) else list(new.split(list(sizes)))

    return feature_output(output, put)
