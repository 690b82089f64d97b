"""Scale the 2-D rotary frequencies of the vision tower of any loaded model, reversibly.

The frequency buffer is replaced and nothing else: a fixed scaling adds no operation to the forward pass, the language
model's positions are untouched, and ``alpha = 0`` leaves the stock tower as it is. ``RopeScaling`` says what g is,
``ROTARY_TOWERS`` which towers can be scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .rope_formulas import RopeScaling
from .rope_modules import ScaledRotary, check_rotary, scale_rotary, unscale_rotary
from .rope_towers import stock_frequencies, tower_of, vision_rotaries

CONFIG_FIELD = "vision_rope_scaling"


def apply_rope_scaling(model: nn.Module, scaling: RopeScaling | Mapping[str, Any] | str | None) -> list[str]:
    """Scale the rotary frequencies of a model's vision tower until ``remove_rope_scaling``.

    The frequencies are computed in float32 from the configuration and stay so when the model is cast. An earlier
    scaling is replaced. The scaling is noted in the model's configuration as ``vision_rope_scaling`` and saved with
    it, but a stock class does not act on it when loading: call this function with that field after
    ``from_pretrained``. With a learned table the parameter ``log_scale`` of the rotary module is part of the state
    dict; ``freeze_rope_scaling`` turns it into fixed values. Gradient checkpointing must then not be reentrant.

    Args:
        model: any model with a tower of ``ROTARY_TOWERS``, possibly compiled or wrapped by PEFT; or the tower.
        scaling: see ``RopeScaling.from_any``; None, or one that changes nothing, gives the stock tower.

    Returns:
        The dotted names of the rotary modules that were set.

    Raises:
        ValueError: no such tower, an invalid scaling, or one the tower cannot take; the model is then as before.
    """
    rotaries = vision_rotaries(model)
    if scaling is None:
        remove_rope_scaling(model)
        return list(rotaries)
    scaling = RopeScaling.from_any(scaling)
    for module in rotaries.values():
        check_rotary(module, scaling)
    for module in rotaries.values():
        scale_rotary(module, scaling)
    _note(model, None if scaling.is_identity else scaling.to_dict())
    return list(rotaries)


def remove_rope_scaling(model: nn.Module) -> None:
    """Bring the stock rotary modules back, bit for bit, and drop the note in the configuration.

    Raises:
        ValueError: the model has no supported tower.
    """
    for module in vision_rotaries(model).values():
        unscale_rotary(module)
    _note(model, None)


@contextmanager
def rope_scaled(model: nn.Module, scaling: RopeScaling | Mapping[str, Any] | str | None) -> Iterator[nn.Module]:
    """Scale the rotary frequencies for the length of a ``with`` block.

    Afterwards, also after an exception, the model is as it was, including an earlier scaling and its parameters.
    Blocks nest, the inner one wins.

    Args:
        model: see ``apply_rope_scaling``.
        scaling: see ``apply_rope_scaling``.

    Yields:
        The same model.

    Raises:
        ValueError: see ``apply_rope_scaling``.
    """
    rotaries = vision_rotaries(model)
    before = {name: (getattr(m, "rope_scaling", None), m._parameters.get("log_scale")) for name, m in rotaries.items()}
    noted = _noted(model)
    try:
        apply_rope_scaling(model, scaling)
        yield model
    finally:
        for name, (outer, parameter) in before.items():
            module = rotaries[name]
            unscale_rotary(module)
            if outer is not None:
                scale_rotary(module, outer)
            if parameter is not None:
                parameter.data = parameter.data.to(module.log_scale.device)
                module.log_scale = parameter
        _note(model, noted)


def rope_scaling_of(model: nn.Module) -> RopeScaling | None:
    """Return the scaling a model has, with the values a learned table has reached; None for a stock tower.

    Raises:
        ValueError: the model has no supported tower, or its rotary modules differ (a PEFT copy beside the original).
    """
    found = {
        name: module.current_scaling() if isinstance(module, ScaledRotary) else None
        for name, module in vision_rotaries(model).items()
    }
    if len(set(found.values())) > 1:
        raise ValueError(f"the rotary modules {', '.join(found)} are scaled differently; merge or choose one")
    return next(iter(found.values()))


def freeze_rope_scaling(model: nn.Module) -> RopeScaling | None:
    """Turn a learned table into fixed values: no parameter and no run-time cost, and the configuration holds it all.

    Returns:
        The scaling the model now has, None for a stock tower.

    Raises:
        ValueError: see ``rope_scaling_of``.
    """
    scaling = rope_scaling_of(model)
    if scaling is not None and scaling.learned:
        scaling = replace(scaling, learned=False)
        apply_rope_scaling(model, scaling)
    return scaling


def frequency_ratios(model: nn.Module) -> torch.Tensor:
    """Return the (F) ratios 2i/d of the tower's frequencies in the order of a table's `values`, float64.

    Raises:
        ValueError: the model has no supported tower.
    """
    module = next(iter(vision_rotaries(model).values()))
    tower: Any = tower_of(module)
    return tower.ratios(len(stock_frequencies(module)))


def _noted(model: nn.Module) -> dict[str, Any] | None:
    return getattr(getattr(model, "config", None), CONFIG_FIELD, None)


def _note(model: nn.Module, settings: dict[str, Any] | None) -> None:
    """Write the settings into the configuration; None takes the note away where the class does not declare it."""
    config: Any = getattr(model, "config", None)
    if config is None or isinstance(config, dict):  # PEFT gives a model without configuration a dict
        return
    if settings is None and not hasattr(type(config), CONFIG_FIELD):
        vars(config).pop(CONFIG_FIELD, None)
    else:
        setattr(config, CONFIG_FIELD, settings)
