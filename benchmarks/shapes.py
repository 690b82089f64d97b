"""Real configurations with random weights, built without a checkpoint: time does not depend on what weights say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from dualstream.eval.decoder_costs import internvl3_8b, llava_1_5_7b, qwen2_5_vl_7b, qwen2_vl_2b, qwen3_vl_8b
from dualstream.modeling.families import family_of

WEIGHT_SCALE = 0.02
# Random numbers that are drawn once and repeated to fill every matrix; a prime, so that no two rows are equal.
REPEATED = 4_194_301
TOY_TEXT = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TOY_MROPE = [4, 6, 6]
TOY_TOKENS = {
    "image_token_id": 2000,
    "image_token_index": 2000,
    "video_token_id": 2001,
    "vision_start_token_id": 2002,
    "vision_end_token_id": 2003,
}


@dataclass(frozen=True)
class Shape:
    """A configuration to measure.

    Attributes:
        config: makes the configuration, that of a checkpoint on the Hub or a toy one.
        image_size: height and width in pixels of the pictures unless a run asks for others.
        is_toy: whether widths and depths are toy ones; classes and the grid of a picture are real all the same.
    """

    config: Callable[[], Any]
    image_size: tuple[int, int]
    is_toy: bool = False


def _toy(real: Callable[[], Any], **vision: Any) -> Callable[[], Any]:
    """Shrink a configuration to toy widths; the picture keeps its grid."""

    def config() -> Any:
        whole = real()
        text, tower = whole.get_text_config(), whole.vision_config
        for part, values in ((text, TOY_TEXT), (tower, vision), (whole, TOY_TOKENS)):
            for name, value in values.items():
                if hasattr(part, name):
                    setattr(part, name, value)
        if family_of(whole).has_mrope:
            text.rope_parameters = {**text.rope_parameters, "mrope_section": TOY_MROPE}
        return whole

    return config


_TOY_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
_TOY_QWEN = {"intermediate_size": 128, "num_heads": 4, "depth": 4, "out_hidden_size": 128}

SHAPES: dict[str, Shape] = {
    "tiny": Shape(_toy(llava_1_5_7b, **_TOY_TOWER), (336, 336), True),
    "tiny-qwen2-vl": Shape(_toy(qwen2_vl_2b, depth=4, embed_dim=64, num_heads=4, hidden_size=128), (448, 672), True),
    "tiny-qwen2.5-vl": Shape(
        _toy(qwen2_5_vl_7b, **_TOY_QWEN, hidden_size=64, fullatt_block_indexes=[1, 3]), (448, 672), True
    ),
    "tiny-qwen3-vl": Shape(
        _toy(qwen3_vl_8b, **_TOY_QWEN, hidden_size=64, deepstack_visual_indexes=[1, 2]), (512, 768), True
    ),
    "tiny-internvl": Shape(_toy(internvl3_8b, **_TOY_TOWER), (448, 896), True),
    "llava-1.5-7b": Shape(llava_1_5_7b, (336, 336)),
    "qwen2-vl-2b": Shape(qwen2_vl_2b, (896, 1120)),
    "qwen2.5-vl-7b": Shape(qwen2_5_vl_7b, (896, 1120)),
    "qwen3-vl-8b": Shape(qwen3_vl_8b, (1024, 1280)),
    "internvl3-8b": Shape(internvl3_8b, (448, 896)),
}


def shape_named(name: str) -> Shape:
    """Return a shape.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"shape={name!r} is unknown; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def build_config(
    name: str, layers: int | None = None, vision_layers: int | None = None, vocab_size: int | None = None
) -> Any:
    """Make the configuration of a shape, shortened only where asked.

    Args:
        name: one of ``SHAPES``.
        layers: blocks of the language model.
        vision_layers: blocks of the vision tower.
        vocab_size: entries of the vocabulary; special tokens keep their ids and must stay within.

    Raises:
        ValueError: the shape is unknown, or a number is not positive or more than the shape has.
    """
    config = shape_named(name).config()
    text, vision = config.get_text_config(), config.vision_config
    depth_name = "num_hidden_layers" if hasattr(vision, "num_hidden_layers") else "depth"
    for option, given, part, field in (
        ("layers", layers, text, "num_hidden_layers"),
        ("vision_layers", vision_layers, vision, depth_name),
    ):
        most = getattr(part, field)
        if given is None:
            continue
        if not 1 <= given <= most:
            raise ValueError(f"{option}={given} must lie within 1..{most}, the depth of {name}")
        setattr(part, field, given)
    if layers is not None and getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    _keep_deep_features(vision, getattr(vision, depth_name))
    if vocab_size is not None:
        text.vocab_size = _checked_vocabulary(config, vocab_size)
    return config


def _keep_deep_features(vision: Any, depth: int) -> None:
    """Let blocks with a role of their own (full attention, deepstack) exist in a tower that was cut."""
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        chosen = getattr(vision, name, None)
        if chosen and max(chosen) >= depth:
            setattr(vision, name, sorted({min(index, depth - 1) for index in chosen}))


def _checked_vocabulary(config: Any, vocab_size: int) -> int:
    names = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    last = max(getattr(config, name, None) or 0 for name in names)
    if vocab_size <= last:
        raise ValueError(f"vocab_size={vocab_size} must be above {last}, the last special token of the shape")
    return vocab_size


def build_model(
    name: str,
    layers: int | None = None,
    vision_layers: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """Build the stock model of a shape with random weights, on its device and in its dtype at once.

    No second copy exists at any time: matrices are allocated uninitialised and filled from one block of random
    numbers, which takes seconds where the usual initialisation of seven billion numbers takes minutes.

    Args:
        name: one of ``SHAPES``.
        layers: blocks of the language model, all if None.
        vision_layers: blocks of the vision tower, all if None.
        vocab_size: entries of the vocabulary.
        dtype: of the weights.
        device: where they go.
        seed: of the weights.

    Returns:
        The model in eval mode, without gradients; it generates without an end token.

    Raises:
        ValueError: see ``build_config``.
    """
    from transformers import AutoModelForImageTextToText

    config = build_config(name, layers, vision_layers, vocab_size)
    with torch.device(device), no_init_weights():
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    _fill(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    family_of(model)  # a shape of an unsupported family is a mistake here
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: int) -> None:
    """Matrices become small random numbers, scales of norms one, everything else with one axis zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(REPEATED, generator=generator) * WEIGHT_SCALE
    cast: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        key = parameter.dtype, parameter.device
        block = cast.setdefault(key, numbers.to(parameter.device, parameter.dtype))
        flat = parameter.view(-1)
        for begin in range(0, flat.numel(), REPEATED):
            part = flat[begin : begin + REPEATED]
            part.copy_(block[: part.numel()])
