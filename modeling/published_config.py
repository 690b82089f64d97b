"""What the configurations of our model classes share: each reads a stock ``config.json`` of its family too."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from .families import stock_model_type


class PublishedConfig:
    """Stands before the stock configuration class of a family.

    Attributes:
        reads_suffixes: suffixes of the model types that are read besides the class's own; ``""`` is the stock type.
    """

    reads_suffixes: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over what a JSON file holds besides the declared fields."""
        # A stock file brings its own model type; stored on the instance it would shadow the type of the class.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's configuration as a dict, from one of ours or from a stock one of the same family.

        Raises:
            ValueError: the checkpoint is of a type that this class does not read.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        found, own = config_dict.get("model_type", ""), cls.model_type  # type: ignore[attr-defined]
        readable = [own, *(stock_model_type(own) + suffix for suffix in cls.reads_suffixes)]
        if found not in readable:
            raise ValueError(
                f"{cls.__name__} reads checkpoints of type {' or '.join(map(repr, readable))}, but "
                f"{pretrained_model_name_or_path} is of type '{found}'. Use the class of that type."
            )
        return {**config_dict, "model_type": own}, kwargs
