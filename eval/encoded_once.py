"""Several conditions of the same images: the vision tower runs for the first of them only."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dualstream.modeling.lens import unwrapped

_NAME = "get_image_features"


@contextmanager
def reusing_image_features(model: nn.Module, memory: dict[str, Any]) -> Iterator[None]:
    """Let a model look up features that it made of the same pixels before, for the length of a ``with`` block.

    Right only where the conditions leave the vision tower and the connector as they are. Compressions do; a scaled
    rotary table or an edit of the tower does not.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        memory: empty for the first block, and handed on from one block to the next. It keeps the features of the last
            ``pixel_values`` tensor; an equal tensor that is another object is encoded anew.
    """
    core: Any = unwrapped(model).model
    stock = getattr(core, _NAME)

    @functools.wraps(stock)  # with its signature, by which callers choose what to pass
    def recalled(*args: Any, **kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        if memory.get("pixels") is not pixels:
            memory.update(features=stock(*args, **kwargs), pixels=pixels)
        return memory["features"]

    before = core.__dict__.get(_NAME)
    setattr(core, _NAME, recalled)
    try:
        yield
    finally:
        if before is None:
            delattr(core, _NAME)
        else:
            setattr(core, _NAME, before)
