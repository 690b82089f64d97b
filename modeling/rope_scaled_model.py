"""What the model classes with scaled rotary frequencies share: building, loading and saving the scaling."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig

from .published_model import PublishedModel
from .rope_modules import ScaledRotary
from .rope_scaling import CONFIG_FIELD, apply_rope_scaling, rope_scaling_of
from .rope_towers import vision_rotaries


class RopeScaledModel(PublishedModel):
    """Stands before the stock ``XForConditionalGeneration`` in the list of bases.

    The model is built with the scaling that ``config.vision_rope_scaling`` describes. ``apply_rope_scaling`` and its
    companions change it later; what the model has when it is saved is what loads again, a learned table included.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict.add("log_scale")
        self._keys_to_ignore_on_load_missing.add(r"\.log_scale$")  # a learned table then starts as configured
        apply_rope_scaling(self, getattr(config, CONFIG_FIELD))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give what the checkpoint does not hold its first values; the stock method writes stock frequencies."""
        super().initialize_weights()
        for module in vision_rotaries(self).values():
            if isinstance(module, ScaledRotary):
                module.restart()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load one of our checkpoints, or a stock checkpoint of the same family.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id, in any key layout the stock class reads.
            *model_args: passed to the stock ``from_pretrained``.
            **kwargs: passed to the stock ``from_pretrained``. ``vision_rope_scaling`` replaces the checkpoint's own
                scaling and what it has learned; ``None`` gives the stock frequencies.

        Returns:
            The model; with ``output_loading_info=True`` also the loading report.

        Raises:
            ValueError: the checkpoint is of another family, or the scaling is invalid or does not fit the tower.
        """
        replaced, scaling = CONFIG_FIELD in kwargs, kwargs.pop(CONFIG_FIELD, None)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if replaced:
            apply_rope_scaling(loaded[0] if isinstance(loaded, tuple) else loaded, scaling)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the model with the scaling it has now, and with its code.

        Args:
            save_directory: the folder to write.
            *args: passed to the stock ``save_pretrained``.
            **kwargs: see ``PublishedModel.save_pretrained``.
        """
        scaling = rope_scaling_of(self)
        # A dict, since a configuration loaded as remote code has another copy of the class.
        setattr(self.config, CONFIG_FIELD, None if scaling is None else scaling.to_dict())
        super().save_pretrained(save_directory, *args, **kwargs)
