"""Load any supported model by name, folder or Hub id, and make the Auto classes of transformers know ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from .decoder_files import holds_decoder
from .families import FAMILIES, ROPE_SCALED_SUFFIX, VISUAL_DECODER_SUFFIX, family_of
from .modeling_internvl_visual_decoder import InternVLWithVisualDecoder
from .modeling_llava_visual_decoder import LlavaWithVisualDecoder
from .modeling_qwen2_5_vl_rope_scaled import Qwen2_5_VLRopeScaled
from .modeling_qwen2_5_vl_visual_decoder import Qwen2_5_VLWithVisualDecoder
from .modeling_qwen2_vl_rope_scaled import Qwen2VLRopeScaled
from .modeling_qwen2_vl_visual_decoder import Qwen2VLWithVisualDecoder
from .modeling_qwen3_vl_rope_scaled import Qwen3VLRopeScaled
from .modeling_qwen3_vl_visual_decoder import Qwen3VLWithVisualDecoder
from .published_model import AUTO_CLASSES, PublishedModel, stock_class
from .rope_formulas import RopeScaling
from .rope_scaled_model import RopeScaledModel
from .rope_scaling import CONFIG_FIELD
from .visual_decoder import VisualDecoder
from .visual_decoder_model import DECODER_PREFIX, HUB_ARGUMENTS, VisualDecoderModel

logger = logging.get_logger(__name__)
CHECKPOINTS = Path(__file__).parent / "checkpoints"
EMBEDDED_MODELS = tuple(sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json")))
DEFAULT_MODEL = "tiny-llava"
MODEL_CLASSES: dict[str, type[VisualDecoderModel]] = {
    "llava": LlavaWithVisualDecoder,
    "qwen2_vl": Qwen2VLWithVisualDecoder,
    "qwen2_5_vl": Qwen2_5_VLWithVisualDecoder,
    "qwen3_vl": Qwen3VLWithVisualDecoder,
    "internvl": InternVLWithVisualDecoder,
}
# The families whose vision tower has rotary frequencies to scale; their classes above can scale them too.
ROPE_SCALED_CLASSES: dict[str, type[RopeScaledModel]] = {
    "qwen2_vl": Qwen2VLRopeScaled,
    "qwen2_5_vl": Qwen2_5_VLRopeScaled,
    "qwen3_vl": Qwen3VLRopeScaled,
}


def _register(model_class: type[PublishedModel]) -> None:
    config_class: Any = model_class.config_class
    stock_config_class: Any = stock_class(model_class).config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in AUTO_CLASSES:
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
    # The stock processor serves too; `dualstream.processing` replaces it by the one that carries the compression.
    if config_class not in PROCESSOR_MAPPING:
        AutoProcessor.register(config_class, PROCESSOR_MAPPING[stock_config_class])


for _class in (*MODEL_CLASSES.values(), *ROPE_SCALED_CLASSES.values()):
    _register(_class)


def default_model_path(name: str = DEFAULT_MODEL) -> Path:
    """Return the folder of a checkpoint that comes with the package.

    Args:
        name: e.g. ``tiny-llava``.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"name={name!r} is no embedded model; embedded are: {', '.join(EMBEDDED_MODELS) or 'none'}.")
    return CHECKPOINTS / name


def infer_class(model_or_config: PreTrainedModel | PreTrainedConfig) -> type[VisualDecoderModel]:
    """Return the class with a visual decoder for a stock (or our own) model or configuration.

    Raises:
        ValueError: the family is not supported.
    """
    return MODEL_CLASSES[family_of(model_or_config).name]


def load_model(
    name_or_path: str | os.PathLike = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    visual_decoder: bool | None = None,
    decoder: VisualDecoder | str | os.PathLike | None = None,
    vision_rope_scaling: RopeScaling | Mapping[str, Any] | str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor, and check that every weight came from the checkpoint.

    Args:
        name_or_path: an embedded name such as ``tiny-llava``, a folder, or a Hub id.
        device: where to put the model; default the first accelerator, else the CPU. Leave it out with ``device_map``.
        dtype: torch dtype or its name; ``"auto"`` takes the checkpoint's.
        visual_decoder: whether to load a stock checkpoint into our class of its family (``XWithVisualDecoder``);
            default, if there is a trained decoder beside its weights. Without one our class starts from a copy of the
            unembedding. A checkpoint of ours is loaded into our class in any case.
        decoder: read with this visual decoder: a decoder, or the folder or Hub id of one, without the model. Asks for
            our class.
        vision_rope_scaling: how to scale the vision tower's rotary frequencies, see ``RopeScaling.from_any``; default,
            as the checkpoint says. A scaled model is of a class of ours (``XRopeScaled`` or ``XWithVisualDecoder``).
        **kwargs: passed to ``from_pretrained``; ``revision``, ``token`` and the like also reach the processor.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        ValueError: the name is unknown, the folder is missing or incomplete, a file is corrupt, the model is not a
            vision-language model of a supported family, its tower cannot be scaled as asked, or `visual_decoder` is
            False and `decoder` given.
    """
    source = _resolve(name_or_path)
    if vision_rope_scaling is not None:
        kwargs[CONFIG_FIELD] = RopeScaling.from_any(vision_rope_scaling)
    if decoder is not None:
        if visual_decoder is False:
            raise ValueError(
                f"visual_decoder=False is for the stock class, which cannot take decoder={str(decoder)!r}."
            )
        visual_decoder, kwargs["decoder"] = True, decoder
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(source, **hub_arguments)
        _require_supported(config, source)
        if visual_decoder is None:
            visual_decoder = holds_decoder(source, **hub_arguments)
        model_class: Any = _model_class(config, visual_decoder, kwargs.get(CONFIG_FIELD))
        model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
        _require_complete(info, source)
        processor = _load_processor(source, config, hub_arguments)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source} does not load as a model: {error}") from error
    if "device_map" not in kwargs:
        model.to(device or _best_device())
    return model.eval(), processor


def _load_processor(source: str, config: PreTrainedConfig, hub_arguments: dict[str, Any]) -> ProcessorMixin:
    processor = AutoProcessor.from_pretrained(source, config=config, **hub_arguments)
    stored, _ = ProcessorMixin.get_processor_dict(source, **hub_arguments)
    saved_as = stored.get("processor_class") or type(processor).__name__
    if saved_as.endswith("WithVisualDecoderProcessor") and saved_as != type(processor).__name__:
        logger.warning(
            f"{source} was saved with a {saved_as} and its compression choice, but a {type(processor).__name__} was "
            "loaded. Call dualstream.processing.register_processors() first to get it."
        )
    return processor


def _resolve(name_or_path: str | os.PathLike) -> str:
    """Turn an embedded name into its folder; let folders and Hub ids through."""
    name = os.fspath(name_or_path)
    if name in EMBEDDED_MODELS:
        return str(CHECKPOINTS / name)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"{name} holds no model: config.json is missing.")
        return name
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if looks_like_hub_id:
        return name
    raise ValueError(
        f"name_or_path={name!r} is neither a folder, nor a Hub id 'owner/name', nor an embedded model "
        f"({', '.join(EMBEDDED_MODELS) or 'none here'})."
    )


def _require_supported(config: PreTrainedConfig, source: str) -> None:
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"{source} is a '{config.model_type}' model without a vision tower, not a vision-language model. "
            f"Supported families: {', '.join(FAMILIES)}."
        )
    family_of(config)


def _model_class(config: PreTrainedConfig, visual_decoder: bool, scaling: RopeScaling | None) -> type[PreTrainedModel]:
    """Return the stock class, unless the checkpoint or the caller wants more than it can do."""
    family = family_of(config).name
    if scaling is not None and family not in ROPE_SCALED_CLASSES:
        raise ValueError(
            f"vision_rope_scaling={str(scaling)!r} needs a vision tower with a rotary table, which a '{family}' model "
            f"has not. Families that can be scaled: {', '.join(ROPE_SCALED_CLASSES)}."
        )
    if visual_decoder or config.model_type.endswith(VISUAL_DECODER_SUFFIX):
        return MODEL_CLASSES[family]
    if scaling is not None or getattr(config, CONFIG_FIELD, None) or config.model_type.endswith(ROPE_SCALED_SUFFIX):
        return ROPE_SCALED_CLASSES[family]
    return stock_class(MODEL_CLASSES[family])


def _require_complete(info: dict[str, Any], source: str) -> None:
    """Never run a model with a random or a forgotten weight; transformers only warns of it."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info[kind] if not str(key).startswith(DECODER_PREFIX))
        if keys:
            raise ValueError(
                f"{source} does not fit its model class: {len(keys)} {kind.replace('_', ' ')} "
                f"({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}). The file may be truncated or of a newer "
                "layout than this transformers release reads."
            )


def _best_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
