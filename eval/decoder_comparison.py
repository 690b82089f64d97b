"""Several readers of the same pictures side by side: cost, agreement with the language model, answers.

Readers: the plain unembedding (baseline), the decoder that comes with the model, every decoder given, the language
model's own map (oracle, a second pass), and that map taken from another picture (control).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling.decoder_tables import token_tables
from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.visual_decoder import VisualDecoder

from .decoder_costs import BASELINE_KIND, CONTEXT_LENGTH, PUBLISHED, cost_rows, decoder_cost, share_of_llm_token
from .decoder_metrics import (
    BASELINE,
    BY_CLASS,
    agreement_figures,
    classes_of,
    estimate_figures,
    other_share,
    read_pictures,
)
from .decoder_questions import CONTROL_MAP, ORACLE, answer_with_decoders
from .scene_questions import FULL, draw_items, summarize
from .statistics import bootstrap_ratio

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

SHIPPED = "shipped"
OF_LINEAR = "_of_linear"  # suffix of a ratio to the trained linear decoder


@dataclass(frozen=True)
class ComparisonSettings:
    """What a comparison depends on besides model and decoders.

    Attributes:
        images: pictures that are read.
        questions: scene questions that are answered; 0 for none.
        method: compression of the questions' pictures.
        depth: blocks after which the language model's map is read; None: all.
        final_norm: whether that map is read with the final norm.
        split: of the scenes, ``validation`` or ``test``.
        image_size: shorter side of the scenes in pixels.
        batch_size: pictures at a time.
        context_length: keys an LLM token attends to, for its cost.
        seed: of the choice of pictures and questions, and of the bootstrap.
    """

    images: int = 300
    questions: int = 300
    method: str = "rle"
    depth: int | None = None
    final_norm: bool = True
    split: str = "test"
    image_size: int = 224
    batch_size: int = 25
    context_length: int = CONTEXT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("questions", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass
class Comparison:
    """Everything a comparison found.

    Attributes:
        readers: one object per reader: name, kind, cost, agreement, answers; null where something does not apply.
        published_sizes: model name -> costs of every kind at its sizes.
        class_space: the decoder in whose classes the ``_by_class`` figures of all readers are taken.
        settings: what it depends on.
        per_image: one row per reader and picture.
        answers: one row per reader and question.
    """

    readers: list[dict[str, Any]]
    published_sizes: dict[str, list[dict[str, Any]]]
    class_space: str | None
    settings: ComparisonSettings
    per_image: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the single rows."""
        names = ("readers", "published_sizes", "class_space")
        return {**{name: getattr(self, name) for name in names}, "settings": asdict(self.settings)}


def compare_decoders(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    decoders: Mapping[str, VisualDecoder],
    settings: ComparisonSettings,
    pictures: Mapping[str, Image] | None = None,
) -> Comparison:
    """Measure cost, agreement and answers of all readers.

    Args:
        model: a supported VLM.
        processor: its processor.
        decoders: name -> decoder, see ``collect_decoders``; must hold the baseline.
        settings: what else it depends on.
        pictures: name -> RGB image to read; None draws held-out scenes.

    Returns:
        All figures, each with n and a 95 % interval.
    """
    pictures = draw_pictures(settings) if pictures is None else pictures
    agreement, per_image = _agreement(model, processor, decoders, pictures, settings)
    rows = []
    if settings.questions:
        items = draw_items(settings.questions, settings.split, settings.seed, settings.image_size)
        options = (settings.method, settings.depth, settings.final_norm, settings.batch_size)
        rows = answer_with_decoders(model, processor, items, decoders, *options)
    arms = summarize(rows, references=(FULL, BASELINE, ORACLE, CONTROL_MAP)) if rows else []
    costs = _costs(model, decoders, settings)
    answers = {arm["arm"]: arm for arm in arms}
    readers = [
        {"name": name, "cost": costs.get(name), "agreement": agreement.get(name), "answers": answers.get(name)}
        for name in (*([FULL] if arms else []), *decoders, ORACLE, CONTROL_MAP)
    ]
    published = {name: cost_rows(make(), settings.context_length) for name, make in PUBLISHED.items()}
    return Comparison(readers, published, class_space(decoders), settings, per_image, rows)


def collect_decoders(model: PreTrainedModel, folders: list[str]) -> dict[str, VisualDecoder]:
    """Name all decoders of a comparison: the baseline, the model's own if it is another one, and those in folders.

    Raises:
        ValueError: a folder holds no decoder of this model, or two have one name.
    """
    inner: Any = unwrapped(model)
    weight = family_of(inner).unembedding(inner).weight
    decoders = {BASELINE: VisualDecoder.from_unembedding(weight)}
    own = getattr(inner, "visual_decoder", None)
    if own is not None and not (own.kind == "linear" and torch.equal(own.weight, weight.to(own.weight.dtype))):
        decoders[SHIPPED] = own
    for folder in folders:
        name = Path(folder).resolve().name
        if name in (FULL, SHIPPED, ORACLE, CONTROL_MAP) or name in decoders:
            raise ValueError(f"decoder {folder}: there is a row {name!r} already; rename the folder.")
        decoder = VisualDecoder.from_pretrained(folder).to(weight.device)
        decoder.check_compatible(inner)
        decoders[name] = decoder
    return decoders


def draw_pictures(settings: ComparisonSettings) -> dict[str, Image]:
    """Held-out scenes, by name."""
    from dualstream.data_builders.scenes import SPLIT_SEEDS, make_scene, render

    seeds = SPLIT_SEEDS[settings.split]
    drawn = random.Random(f"pictures-{settings.split}-{settings.seed}").sample(range(len(seeds)), settings.images)
    return {f"scene {seeds[i]}": render(make_scene(seeds[i]), settings.image_size) for i in drawn}


def class_space(decoders: Mapping[str, VisualDecoder]) -> str | None:
    """Name of the first pruned decoder: figures by class compare only within one set of classes."""
    return next((name for name, decoder in decoders.items() if decoder.kind == "pruned"), None)


def _agreement(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    decoders: Mapping[str, VisualDecoder],
    pictures: Mapping[str, Image],
    settings: ComparisonSettings,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Reader -> figure -> estimate, and one row per reader and picture."""
    readings = read_pictures(
        model,
        processor,
        pictures.values(),
        decoders,
        settings.depth,
        settings.final_norm,
        settings.batch_size,
    )
    tables = token_tables(processor.tokenizer, decoders[BASELINE].vocab_size)
    space = class_space(decoders)
    classes = None if space is None else classes_of(decoders[space])
    ids = {**readings.students, CONTROL_MAP: readings.other_picture()}
    figures = {name: agreement_figures(readings, reading, *tables, classes) for name, reading in ids.items()}
    for name, decoder in decoders.items():
        if decoder.kind == "pruned":
            figures[name]["other_share"] = other_share(readings, decoder)
    estimates = {
        name: estimate_figures(values, None if name == BASELINE else figures[BASELINE], settings.seed)
        for name, values in figures.items()
    }
    linear = next((name for name, decoder in decoders.items() if decoder.kind == "linear" and name != BASELINE), None)
    for name in [name for name, decoder in decoders.items() if linear and decoder.kind != "linear"]:
        for figure in {"top1", "top1" + BY_CLASS} & figures[name].keys():
            pair = figures[name][figure], figures[linear or name][figure]
            estimates[name][figure + OF_LINEAR] = bootstrap_ratio(*pair, settings.seed)
    per_image = [
        {"reader": name, "picture": picture, **{figure: float(column[i]) for figure, column in values.items()}}
        for name, values in figures.items()
        for i, picture in enumerate(pictures)
    ]
    return {name: {k: v.to_dict() for k, v in row.items()} for name, row in estimates.items()}, per_image


def _costs(
    model: PreTrainedModel, decoders: Mapping[str, VisualDecoder], settings: ComparisonSettings
) -> dict[str, dict[str, Any]]:
    """Cost of every decoder, and of the oracle's second pass."""
    config = unwrapped(model).config
    costs: dict[str, dict[str, Any]] = {}
    for name, decoder in decoders.items():
        kind = BASELINE_KIND if name == BASELINE else decoder.kind
        classes = decoder.num_classes if kind == "pruned" else None
        cost = decoder_cost(kind, decoder.vocab_size, decoder.hidden_size, classes)
        share = share_of_llm_token(cost, config, settings.context_length)  # type: ignore[arg-type]
        costs[name] = {**cost.to_dict(), "share_of_llm_token": share, "context_length": settings.context_length}
    blocks = config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    costs[ORACLE] = {
        "kind": "second pass",
        "parameters": 0,
        "megabytes": 0.0,
        "share_of_llm_token": (blocks if settings.depth is None else settings.depth) / blocks,
        "context_length": settings.context_length,
    }
    return costs
