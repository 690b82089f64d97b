"""InternVL that reads its image tokens as text and answers from fewer of them."""

from transformers import InternVLForConditionalGeneration

from .configuration_visual_decoder import InternVLWithVisualDecoderConfig
from .published_model import publish
from .visual_decoder_model import VisualDecoderModel


class InternVLWithVisualDecoder(VisualDecoderModel, InternVLForConditionalGeneration):
    """InternVL with a visual decoder and compressed prompts; loads stock checkpoints too."""

    config: InternVLWithVisualDecoderConfig


publish(InternVLWithVisualDecoder)
