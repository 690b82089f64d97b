"""LLaVA-1.5 that reads its image tokens as text and answers from fewer of them."""

from transformers import LlavaForConditionalGeneration

from .configuration_visual_decoder import LlavaWithVisualDecoderConfig
from .published_model import publish
from .visual_decoder_model import VisualDecoderModel


class LlavaWithVisualDecoder(VisualDecoderModel, LlavaForConditionalGeneration):
    """LLaVA-1.5 with a visual decoder and compressed prompts; loads stock checkpoints too."""

    config: LlavaWithVisualDecoderConfig


publish(LlavaWithVisualDecoder)
