"""Qwen2-VL that reads its image tokens as text and answers from fewer of them."""

from transformers import Qwen2VLForConditionalGeneration

from .configuration_visual_decoder import Qwen2VLWithVisualDecoderConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel
from .visual_decoder_model import VisualDecoderModel


class Qwen2VLWithVisualDecoder(VisualDecoderModel, RopeScaledModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with a visual decoder, compressed prompts and scalable RoPE; loads stock checkpoints too."""

    config: Qwen2VLWithVisualDecoderConfig


publish(Qwen2VLWithVisualDecoder)
