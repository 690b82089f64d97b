"""Qwen2-VL that reads its image tokens as text and answers from fewer of them."""

from transformers import Qwen2VLForConditionalGeneration

from .configuration_visual_decoder import Qwen2VLWithVisualDecoderConfig
from .visual_decoder_model import VisualDecoderModel, publish


class Qwen2VLWithVisualDecoder(VisualDecoderModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with a visual decoder and compressed prompts; loads stock checkpoints too."""

    config: Qwen2VLWithVisualDecoderConfig


publish(Qwen2VLWithVisualDecoder)
