"""Qwen3-VL whose vision tower has scaled rotary frequencies."""

from transformers import Qwen3VLForConditionalGeneration

from .configuration_rope_scaled import Qwen3VLRopeScaledConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel


class Qwen3VLRopeScaled(RopeScaledModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with scaled rotary frequencies in its vision tower; loads stock checkpoints too."""

    config: Qwen3VLRopeScaledConfig


publish(Qwen3VLRopeScaled)
