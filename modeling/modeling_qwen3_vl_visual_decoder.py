"""Qwen3-VL that reads its image tokens as text and answers from fewer of them."""

from transformers import Qwen3VLForConditionalGeneration

from .configuration_visual_decoder import Qwen3VLWithVisualDecoderConfig
from .visual_decoder_model import VisualDecoderModel, publish


class Qwen3VLWithVisualDecoder(VisualDecoderModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a visual decoder and compressed prompts; loads stock checkpoints too."""

    config: Qwen3VLWithVisualDecoderConfig


publish(Qwen3VLWithVisualDecoder)
