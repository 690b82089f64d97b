"""What is measured on every curve of ``growth``: one variable at a time, the ways of every value, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dualstream.eval.decoder_costs import largest_pruned
from dualstream.eval.prompt_costs import kv_bytes_per_token
from dualstream.modeling import VisualDecoder, compressing
from dualstream.modeling.families import family_of, flatten_features

from ..closed_form import Flops, answer_flops, connector_flops, prefill_flops, reading_flops, tower_flops
from ..forced_map import build_decoder, forced, kept_cells
from ..prefill import FULL, LIMIT, OURS, Way, compressed, feature_grids, native_short, uncompressed
from ..workload import Inputs, image_inputs_of, make_inputs

READING = "reading"

Row = dict[str, Any]


@dataclass
class Point:
    """One value of the variable of a curve.

    Attributes:
        x: the value.
        ways: what is timed, by name.
        flops: of every way, from the closed form.
        facts: further columns of its rows.
    """

    x: float
    ways: dict[str, Callable[[], Any]]
    flops: dict[str, int]
    facts: Row = field(default_factory=dict)


@dataclass
class Growth:
    """What all curves share.

    Attributes:
        model: a stock model.
        shape: its name, whose full depth ``depth`` extrapolates to.
        image_size: height and width in pixels, the largest of the curve over sizes.
        text_tokens: of a row.
        reduction: share of visual tokens that compression removes.
        decoder: kind that reads, see ``forced_map.build_decoder``.
        quick: three points per curve, without the limit where the headline has it already; for machines on which a
            point takes seconds.
    """

    model: Any
    shape: str
    image_size: tuple[int, int]
    text_tokens: int
    reduction: float
    decoder: str
    quick: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Ways of a point."""
        return (FULL, OURS) if self.quick else (FULL, LIMIT, OURS)

    def __post_init__(self) -> None:
        self.reader = build_decoder(self.decoder, self.model)

    def first_token(
        self,
        x: float | None,
        image_size: tuple[int, int] | None = None,
        batch: int = 1,
        images: int = 1,
        reduction: float | None = None,
        names: Sequence[str] | None = None,
    ) -> Point:
        """Make a point whose ways lead to the first token; x None stands for the visual tokens of a row."""
        names = names or self.names
        image_size, reduction = image_size or self.image_size, self.reduction if reduction is None else reduction
        inputs = make_inputs(self.model, image_size, batch, images, self.text_tokens)
        grids = feature_grids(self.model, inputs)
        made: dict[str, Callable[[], Way]] = {
            FULL: lambda: uncompressed(self.model, inputs),
            LIMIT: lambda: native_short(self.model, inputs, reduction, grids),
            OURS: lambda: compressed(self.model, inputs, reduction, self.reader, grids),
        }
        cells, kept = int(grids.prod(-1).sum()) // batch, int(kept_cells(grids, reduction).sum()) // batch
        text = inputs["input_ids"].shape[1] - cells
        config, seen = self.model.config, self.seeing(image_size) * (images * batch)
        long, short = (prefill_flops(config, text + tokens) * batch for tokens in (cells, kept))
        read = reading_flops(config, cells * batch, self.decoder)
        flops = {FULL: seen + long, LIMIT: seen + short, OURS: seen + read + short}
        kv = kv_bytes_per_token(self.model) * batch
        facts = {
            "batch": batch,
            "images": images,
            "visual_tokens": cells,
            "kept_tokens": kept,
            "reduction": reduction,
            "kv_bytes": {FULL: kv * (text + cells), LIMIT: kv * (text + kept), OURS: kv * (text + kept)},
        }
        ways: dict[str, Callable[[], Any]] = {name: made[name]() for name in names}
        return Point(cells if x is None else x, ways, {name: flops[name].total for name in names}, facts)

    def seeing(self, image_size: tuple[int, int]) -> Flops:
        """FLOPs of tower and connector on one picture."""
        return tower_flops(self.model.config, image_size) + connector_flops(self.model.config, image_size)

    def image_sizes(self) -> list[tuple[int, int]]:
        """Sizes up to the largest; only one where the tower has a fixed size."""
        family, vision, (height, width) = family_of(self.model), self.model.config.vision_config, self.image_size
        if family.has_mrope:
            cell = vision.patch_size * vision.spatial_merge_size
            shares = (0.35, 0.7, 1.0) if self.quick else (0.35, 0.5, 0.7, 0.85, 1.0)
            return [(round(height * s / cell) * cell, round(width * s / cell) * cell) for s in shares]
        if family.name == "internvl":
            tile = vision.image_size[0]
            return [(tile, tile * tiles) for tiles in ((1, 2, 3) if self.quick else (1, 2, 3, 4))]
        return [self.image_size]


def _image_size_points(growth: Growth) -> list[Point]:
    return [growth.first_token(None, image_size=size) for size in growth.image_sizes()]


def _batch_points(growth: Growth) -> list[Point]:
    return [growth.first_token(batch, batch=batch) for batch in ((1, 2, 3) if growth.quick else (1, 2, 4, 8))]


def _images_points(growth: Growth) -> list[Point]:
    return [growth.first_token(None, images=images) for images in ((1, 2, 3) if growth.quick else (1, 2, 3, 4))]


def _reduction_points(growth: Growth) -> list[Point]:
    points = []
    for reduction in (0.8, 0.5, 0.2) if growth.quick else (0.84, 0.68, 0.49, 0.32, 0.16):
        point = growth.first_token(None, reduction=reduction, names=(LIMIT, OURS))
        point.x = point.facts["kept_tokens"]
        points.append(point)
    return points


@torch.no_grad()
def _vocabulary_points(growth: Growth) -> list[Point]:
    """Reading alone: a linear decoder has a row per token, a pruned one the same classes always."""
    model, config = growth.model, growth.model.config
    pictures = image_inputs_of(model, make_inputs(model, growth.image_size, text_tokens=growth.text_tokens))
    features = flatten_features(model.model.get_image_features(**pictures, return_dict=True).pooler_output)
    weight = family_of(model).unembedding(model).weight.detach()
    shares = (4, 2, 1) if growth.quick else (16, 8, 4, 2, 1)
    classes = min(largest_pruned(config), len(weight) // shares[0])
    points = []
    for size in (len(weight) // share for share in shares):
        linear = VisualDecoder.from_unembedding(weight[:size])
        pruned = VisualDecoder.blank(size, weight.shape[1], "pruned", classes, weight)
        pruned.own_parameter.data.copy_(weight[:classes])
        pruned.set_classes(torch.arange(size).clamp(max=classes - 1), torch.arange(classes))
        readers = {f"{READING}, linear": linear, f"{READING}, pruned": pruned.requires_grad_(False)}
        flops = {name: 2 * len(features) * reader.num_classes * weight.shape[1] for name, reader in readers.items()}
        ways = {name: _reading(reader, features) for name, reader in readers.items()}
        points.append(Point(size, ways, flops, {"visual_tokens": len(features), "classes": classes}))
    return points


def _reading(reader: VisualDecoder, features: torch.Tensor) -> Callable[[], Any]:
    return lambda: reader.top_k(features, 1)


def _answer_points(growth: Growth) -> list[Point]:
    model = growth.model
    inputs = make_inputs(model, growth.image_size, text_tokens=growth.text_tokens)
    grids = feature_grids(model, inputs)
    reader = forced(growth.reader, grids, growth.reduction)
    short = growth.first_token(None)
    text = inputs["input_ids"].shape[1] - short.facts["visual_tokens"]
    lengths = {FULL: text + short.facts["visual_tokens"], OURS: text + short.facts["kept_tokens"]}
    facts = {name: value for name, value in short.facts.items() if name != "kv_bytes"}
    points = []
    for tokens in (1, 6, 12) if growth.quick else (1, 16, 32, 64):
        flops = {
            name: short.flops[name] + answer_flops(model.config, length, tokens - 1).total
            for name, length in lengths.items()
        }
        ways = {FULL: _answer(model, inputs, tokens, None), OURS: _answer(model, inputs, tokens, reader)}
        kv = {name: kv_bytes_per_token(model) * (length + tokens - 1) for name, length in lengths.items()}
        points.append(Point(tokens, ways, flops, {**facts, "kv_bytes": kv}))
    return points


def _answer(model: Any, inputs: Inputs, tokens: int, reader: VisualDecoder | None) -> Callable[[], Any]:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def way() -> Any:
        if reader is None:
            return model.generate(**inputs, **options)
        with compressing(model, "rle", decoder=reader):
            return model.generate(**inputs, **options)

    return way


def _depth_points(growth: Growth) -> list[Point]:
    """Blocks of the language model; the deepest point also reads by itself, see ``_full_depth_row``."""
    model, deepest = growth.model, growth.model.config.get_text_config().num_hidden_layers
    points = []
    shares = (0.25, 0.5, 1.0) if growth.quick else (0.25, 0.5, 0.75, 1.0)
    for layers in sorted({max(1, round(deepest * share)) for share in shares}):
        with cut(model, layers):
            point = growth.first_token(layers)
        point.ways = {name: _at_depth(model, layers, way) for name, way in point.ways.items()}
        points.append(point)
    deepest_point = points[-1]
    deepest_point.ways[READING] = _features_reading(growth)
    cells = deepest_point.facts["visual_tokens"]
    deepest_point.flops[READING] = reading_flops(model.config, cells, growth.decoder).total
    return points


@torch.no_grad()
def _features_reading(growth: Growth) -> Callable[[], Any]:
    model = growth.model
    pictures = image_inputs_of(model, make_inputs(model, growth.image_size, text_tokens=growth.text_tokens))
    features = flatten_features(model.model.get_image_features(**pictures, return_dict=True).pooler_output)
    weight = family_of(model).unembedding(model).weight.detach()
    return lambda: growth.reader.top_k(features, 1, weight)


def _at_depth(model: nn.Module, layers: int, way: Callable[[], Any]) -> Callable[[], Any]:
    def cut_way() -> Any:
        with cut(model, layers):
            return way()

    return cut_way


@contextmanager
def cut(model: nn.Module, layers: int) -> Iterator[None]:
    """Let the language model end after its first blocks, for the length of a ``with`` block."""
    language_model: Any = family_of(model).language_model(model)
    config, whole = language_model.config, language_model.layers
    saved = {name: getattr(config, name) for name in ("num_hidden_layers", "layer_types") if hasattr(config, name)}
    try:
        language_model.layers = whole[:layers]
        config.num_hidden_layers = layers
        if saved.get("layer_types"):
            config.layer_types = saved["layer_types"][:layers]
        yield
    finally:
        language_model.layers = whole
        for name, value in saved.items():
            setattr(config, name, value)


POINTS: dict[str, Callable[[Growth], list[Point]]] = {
    "image size": _image_size_points,
    "batch": _batch_points,
    "images": _images_points,
    "reduction": _reduction_points,
    "vocabulary": _vocabulary_points,
    "answer length": _answer_points,
    "depth": _depth_points,
}
