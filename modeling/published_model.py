"""What makes a model class of ours one for the Hub: it loads every key layout and saves its code with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import custom_object_save

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")

# What the mixin stands before has no common type: the transformers class of a family.
if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class PublishedModel(_Base):
    """Stands before the stock ``XForConditionalGeneration`` in the list of bases."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.loss_type = "ForConditionalGeneration"  # transformers reads it off the class name, which here is another

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code: the folder loads with ``trust_remote_code=True`` without this package.

        Args:
            save_directory: the folder to write.
            *args: passed to the stock ``save_pretrained``.
            **kwargs: passed to the stock ``save_pretrained``. ``save_original_format`` is False unless given: the
                current key layout, not the one the model was loaded from, loads wherever the code does.
        """
        self._name_in_auto_map()
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_code(self, save_directory: str | os.PathLike) -> None:
        """Save configuration and code as ``save_pretrained`` does, and no weights; the model may be on "meta"."""
        self._name_in_auto_map()
        self.config.architectures = [type(self).__name__]
        os.makedirs(save_directory, exist_ok=True)
        config: Any = self.config  # the annotation of transformers says dict
        custom_object_save(self, save_directory, config=config)
        self.config.save_pretrained(save_directory)

    def _name_in_auto_map(self) -> None:
        name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **dict.fromkeys(AUTO_CLASSES, name)}


def stock_class(model_class: type[PublishedModel]) -> type[PreTrainedModel]:
    """Return the transformers class that one of our model classes extends."""
    return next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))


def publish(model_class: type[PublishedModel]) -> None:
    """Prepare a model class for the Hub: old key layouts load into it, and saving it copies its code.

    transformers applies its key conversions only to its own classes, so without this the language model of an old
    checkpoint would stay random. Both this package and the copy of its code in a checkpoint register the class.
    """
    stock = stock_class(model_class)
    mapping = get_checkpoint_conversion_mapping(stock.__name__)
    if mapping is None:
        mapping = get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
    model_class.register_for_auto_class(AUTO_CLASSES[0])
