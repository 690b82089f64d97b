"""Qwen3-VL that reads its image tokens as text and answers from fewer of them."""

from transformers import Qwen3VLForConditionalGeneration

from .configuration_visual_decoder import Qwen3VLWithVisualDecoderConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel
from .visual_decoder_model import VisualDecoderModel


class Qwen3VLWithVisualDecoder(VisualDecoderModel, RopeScaledModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a visual decoder, compressed prompts and scalable RoPE; loads stock checkpoints too."""

    config: Qwen3VLWithVisualDecoderConfig


publish(Qwen3VLWithVisualDecoder)
