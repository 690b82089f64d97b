"""Configurations of the three model classes whose vision tower has scaled rotary frequencies.

Each is the stock configuration of its family plus ``vision_rope_scaling``, under the model type
``<stock>_rope_scaled``. A stock ``config.json`` can be read with them.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from .published_config import PublishedConfig
from .rope_scaling_fields import RopeScalingFields


class Qwen2VLRopeScaledConfig(RopeScalingFields, PublishedConfig, Qwen2VLConfig):
    """Qwen2-VL configuration with scaled rotary frequencies in the vision tower."""

    model_type = "qwen2_vl_rope_scaled"


class Qwen2_5_VLRopeScaledConfig(RopeScalingFields, PublishedConfig, Qwen2_5_VLConfig):
    """Qwen2.5-VL configuration with scaled rotary frequencies in the vision tower."""

    model_type = "qwen2_5_vl_rope_scaled"


class Qwen3VLRopeScaledConfig(RopeScalingFields, PublishedConfig, Qwen3VLConfig):
    """Qwen3-VL configuration with scaled rotary frequencies in the vision tower."""

    model_type = "qwen3_vl_rope_scaled"


for _config_class in (Qwen2VLRopeScaledConfig, Qwen2_5_VLRopeScaledConfig, Qwen3VLRopeScaledConfig):
    _config_class.register_for_auto_class()
