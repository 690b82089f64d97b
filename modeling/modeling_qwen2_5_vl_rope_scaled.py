"""Qwen2.5-VL whose vision tower has scaled rotary frequencies."""

from transformers import Qwen2_5_VLForConditionalGeneration

from .configuration_rope_scaled import Qwen2_5_VLRopeScaledConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel


class Qwen2_5_VLRopeScaled(RopeScaledModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with scaled rotary frequencies in its vision tower; loads stock checkpoints too."""

    config: Qwen2_5_VLRopeScaledConfig


publish(Qwen2_5_VLRopeScaled)
