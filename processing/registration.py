"""Make `AutoProcessor` give our processors for our configurations."""

from __future__ import annotations

from transformers import AutoProcessor

from dualstream.modeling.configuration_visual_decoder import CONFIG_CLASSES

from .processing_visual_decoder import PROCESSOR_CLASSES


def register_processors() -> None:
    """Register every processor class for the configuration class of its family; harmless when repeated."""
    for config_class in CONFIG_CLASSES:
        family = config_class.model_type.removesuffix("_visual_decoder")
        AutoProcessor.register(config_class, PROCESSOR_CLASSES[family], exist_ok=True)
