"""Configurations of the five model classes that carry a visual decoder.

Each is the stock configuration of its family plus a few fields, under the model type ``<stock>_visual_decoder``. A
stock ``config.json`` can be read with them: that is how a stock checkpoint becomes one of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import InternVLConfig, LlavaConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from .families import ROPE_SCALED_SUFFIX
from .published_config import PublishedConfig
from .rope_scaling_fields import RopeScalingFields
from .visual_compression import CompressionConfig
from .visual_decoder import KINDS, VisualDecoder


@dataclass(init=False, repr=False, eq=False)
class VisualDecoderFields(PublishedConfig):
    """The fields our configurations add to a stock one.

    Attributes:
        visual_compression: how ``generate`` and ``forward`` compress visual tokens unless a call says otherwise; kept
            as a plain dict, ``None`` for no compression. A method name or a ``CompressionConfig`` may be assigned.
        visual_decoder_kind: ``linear``, ``factored`` or ``pruned``, see ``VisualDecoder``.
        visual_decoder_classes: readings a pruned decoder chooses from, ``None`` for the other kinds.
        visual_decoder_trained: whether the visual decoder was trained (``False``: it reads as the unembedding does).
        visual_decoder_training: what its trainer noted down, JSON values.
        weights_from: the stock checkpoint of the Hub whose weights the model has, ``{"repo_id", "revision"}``; the
            files beside this configuration then hold none. ``None``: they hold the weights.
    """

    visual_compression: dict[str, Any] | None = None
    visual_decoder_kind: str = "linear"
    visual_decoder_classes: int | None = None
    visual_decoder_trained: bool = False
    visual_decoder_training: dict[str, Any] | None = None
    weights_from: dict[str, str | None] | None = None

    reads_suffixes: ClassVar[tuple[str, ...]] = ("", ROPE_SCALED_SUFFIX)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check the compression settings and the decoder's kind whenever they are set, at construction or later.

        Raises:
            ValueError: the settings name an unknown method, option or value, or the kind is unknown.
        """
        if name == "visual_decoder_kind" and value not in KINDS:
            raise ValueError(f"visual_decoder_kind={value!r} is unknown; choose one of {', '.join(KINDS)}")
        if name == "visual_compression" and value is not None:
            value = CompressionConfig.from_any(value).to_dict()
        super().__setattr__(name, value)

    def describe_decoder(self, decoder: VisualDecoder) -> None:
        """Write down which decoder the model has."""
        self.visual_decoder_kind = decoder.kind
        self.visual_decoder_classes = decoder.num_classes if decoder.kind == "pruned" else None
        self.visual_decoder_trained = bool(decoder.training_facts)
        self.visual_decoder_training = dict(decoder.training_facts) or None


class LlavaWithVisualDecoderConfig(VisualDecoderFields, LlavaConfig):
    """LLaVA-1.5 configuration with a visual decoder."""

    model_type = "llava_visual_decoder"


class Qwen2VLWithVisualDecoderConfig(RopeScalingFields, VisualDecoderFields, Qwen2VLConfig):
    """Qwen2-VL configuration with a visual decoder."""

    model_type = "qwen2_vl_visual_decoder"


class Qwen2_5_VLWithVisualDecoderConfig(RopeScalingFields, VisualDecoderFields, Qwen2_5_VLConfig):
    """Qwen2.5-VL configuration with a visual decoder."""

    model_type = "qwen2_5_vl_visual_decoder"


class Qwen3VLWithVisualDecoderConfig(RopeScalingFields, VisualDecoderFields, Qwen3VLConfig):
    """Qwen3-VL configuration with a visual decoder."""

    model_type = "qwen3_vl_visual_decoder"


class InternVLWithVisualDecoderConfig(VisualDecoderFields, InternVLConfig):
    """InternVL (Hugging Face port) configuration with a visual decoder."""

    model_type = "internvl_visual_decoder"


CONFIG_CLASSES = (
    LlavaWithVisualDecoderConfig,
    Qwen2VLWithVisualDecoderConfig,
    Qwen2_5_VLWithVisualDecoderConfig,
    Qwen3VLWithVisualDecoderConfig,
    InternVLWithVisualDecoderConfig,
)
for _config_class in CONFIG_CLASSES:
    _config_class.register_for_auto_class()
