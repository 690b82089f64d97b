"""Qwen2-VL whose vision tower has scaled rotary frequencies."""

from transformers import Qwen2VLForConditionalGeneration

from .configuration_rope_scaled import Qwen2VLRopeScaledConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel


class Qwen2VLRopeScaled(RopeScaledModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with scaled rotary frequencies in its vision tower; loads stock checkpoints too."""

    config: Qwen2VLRopeScaledConfig


publish(Qwen2VLRopeScaled)
