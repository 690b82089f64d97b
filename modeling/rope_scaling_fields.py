"""The field by which a configuration scales the vision tower's rotary frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rope_formulas import RopeScaling


@dataclass(init=False, repr=False, eq=False)
class RopeScalingFields:
    """Stands before the other bases of a configuration class.

    Attributes:
        vision_rope_scaling: the scaling a model is built with, kept as a plain dict, ``None`` for the stock
            frequencies. A string such as ``poly:99:8`` or a ``RopeScaling`` may be assigned. A model that is already
            built changes by ``apply_rope_scaling``, which notes the scaling here.
    """

    vision_rope_scaling: dict[str, Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Check the scaling whenever it is set, at construction or later.

        Raises:
            TypeError: the value is no scaling at all.
            ValueError: the scaling names an unknown type, axis or field, or a number out of range.
        """
        if name == "vision_rope_scaling" and value is not None:
            value = RopeScaling.from_any(value).to_dict()
        super().__setattr__(name, value)
