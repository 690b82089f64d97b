"""Qwen2.5-VL that reads its image tokens as text and answers from fewer of them."""

from transformers import Qwen2_5_VLForConditionalGeneration

from .configuration_visual_decoder import Qwen2_5_VLWithVisualDecoderConfig
from .published_model import publish
from .rope_scaled_model import RopeScaledModel
from .visual_decoder_model import VisualDecoderModel


class Qwen2_5_VLWithVisualDecoder(VisualDecoderModel, RopeScaledModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with a visual decoder, compressed prompts and scalable RoPE; loads stock checkpoints too."""

    config: Qwen2_5_VLWithVisualDecoderConfig


publish(Qwen2_5_VLWithVisualDecoder)
