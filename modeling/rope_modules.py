"""Rotary modules of stock towers whose frequencies are scaled.

A scaled module is an instance of a subclass of its stock class. It differs in the frequency buffer, of shape
(columns, F) where the axes differ, which broadcasts against the columns of positions in the very same operations:
a fixed scaling costs nothing at run time. Learned tables and tables per grid size need a forward of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization

from .rope_formulas import RopeScaling
from .rope_towers import RotaryTower, stock_frequencies, tower_of


def check_rotary(module: Any, scaling: RopeScaling) -> None:
    """Check that a rotary module can take a scaling.

    Raises:
        ValueError: the tower cannot scale its axes apart, learn or tell grid sizes; or the table does not fit.
    """
    tower: Any = tower_of(module)
    count = len(stock_frequencies(module))
    moving = scaling.learned or scaling.grid_sizes is not None
    columns = _column_factors(tower, scaling, count)[0]
    if tower.form == "coordinates" and (moving or not torch.equal(columns[0], columns[1])):
        raise ValueError(f"the {tower.name} tower shares its frequencies: it takes one fixed scaling of both axes")
    if scaling.grid_sizes is not None and not tower.packed:
        raise ValueError(f"grid_sizes needs positions that tell the grid size; those of {tower.name} do not")
    if moving and "forward" in vars(module):
        raise ValueError("the rotary module's forward is hooked; apply a learned or per-grid scaling before dispatch")


def scale_rotary(module: Any, scaling: RopeScaling) -> None:
    """Give a rotary module scaled frequencies; an earlier scaling is replaced."""
    check_rotary(module, scaling)
    unscale_rotary(module)
    if scaling.is_identity:
        return
    tower: Any = tower_of(module)
    stock = getattr(module, tower.buffer)
    moving = scaling.learned or scaling.grid_sizes is not None
    stock_class: Any = type(module)
    module.__class__ = scaled_class(stock_class, MIXINS[tower.form == "complex", moving])
    module.rope_scaling = scaling
    # The stock buffer stays beside the scaled one, so that it shares every move and comes back as it would be.
    module.register_buffer("unscaled", stock, persistent=False)
    if scaling.learned:
        factors = scaling.factors(tower.ratios(len(stock_frequencies(module))))
        module.log_scale = nn.Parameter(factors.log().float().to(stock.device))
    module.refresh()


def unscale_rotary(module: Any) -> None:
    """Bring the stock module back: its class, its buffer and nothing else. Does nothing to a stock module."""
    if not isinstance(module, ScaledRotary):
        return
    tower: Any = tower_of(module)
    stock = module._buffers["unscaled"]
    for name in ("unscaled", "log_scale", "rope_scaling"):
        if hasattr(module, name):
            delattr(module, name)
    module.__class__ = module.stock_class
    module._buffers[tower.buffer] = stock


class ScaledRotary(nn.Module):
    """Mixed into a stock rotary class: scaled frequencies, never kept below float32."""

    stock_class: type
    rope_scaling: RopeScaling
    log_scale: nn.Parameter  # (grid sizes or 1, scaled axes, F), only of a learned table

    def refresh(self) -> None:
        """Write the buffer anew from the configuration, on the device it is on."""
        tower: Any = tower_of(self)
        frequencies = stock_frequencies(self)
        factors = _column_factors(tower, self.rope_scaling, len(frequencies))
        device: Any = self._buffers["unscaled"].device  # type: ignore[union-attr]
        self._buffers[tower.buffer] = self._table(frequencies, factors).to(device)

    def restart(self) -> None:
        """Write everything that was not loaded from a checkpoint anew, as after scaling a new stock module."""
        tower: Any = tower_of(self)
        device: Any = self._buffers["unscaled"].device  # type: ignore[union-attr]
        self._buffers["unscaled"] = self.stock_class(self.config)._buffers[tower.buffer].to(device)
        if self.rope_scaling.learned:
            factors = self.rope_scaling.factors(tower.ratios(len(stock_frequencies(self))))
            initialization.copy_(self.log_scale, factors.log().float())  # leaves a loaded parameter alone
        self.refresh()

    def current_scaling(self) -> RopeScaling:
        """Return the scaling with the values that are learned so far."""
        if not self.rope_scaling.learned:
            return self.rope_scaling
        settings = self.rope_scaling.to_dict() | {"values": self.log_scale.detach().double().exp()}
        return RopeScaling.from_any({name: value for name, value in settings.items() if name not in ("alpha", "p")})

    def extra_repr(self) -> str:
        """Show the scaling when the model is printed."""
        return f"rope_scaling={self.rope_scaling}"

    def _table(self, frequencies: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the buffer, (F) as in the stock module where the columns agree, else (columns, F).

        Args:
            frequencies: (F) stock frequencies, float32.
            factors: (tables, columns, F), float64, on the CPU.
        """
        columns = factors[0]
        factor = columns[0] if bool((columns == columns[:1]).all()) else columns
        return (frequencies.double() * factor.to(frequencies.device)).float()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or cast like any module, except that frequencies are moved but not rounded."""
        tower: Any = tower_of(self)
        buffer = self._buffers[tower.buffer]
        probe = fn(torch.empty(0, device=buffer.device))  # type: ignore[union-attr]
        if torch.finfo(probe.dtype).bits >= 32:
            return super()._apply(fn, recurse)
        exact = self._buffers.pop(tower.buffer)
        scale = self._parameters.pop("log_scale", None)
        super()._apply(fn, recurse)
        self._buffers[tower.buffer] = exact.to(probe.device)  # type: ignore[union-attr]
        if scale is not None:
            scale.data = scale.data.to(probe.device)
            scale.grad = None if scale.grad is None else scale.grad.to(probe.device)
            self._parameters["log_scale"] = scale
        return self

    def __reduce__(self) -> Any:
        """Copy and pickle by the stock class, since the scaled one exists only at run time."""
        mixin = type(self).__bases__[0]
        return _new_scaled, (self.stock_class, mixin), self.__dict__


class ScaledComplexRotary(ScaledRotary):
    """The same for a module that holds finished rotations."""

    def _table(self, frequencies: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return _rotations(self.config, super()._table(frequencies, factors))


class MovingRotary(ScaledRotary):
    """Frequencies that change between calls: learned, or chosen by the size of the grid."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin as the stock module does, with gradients to a learned table."""
        table = self.frequency_tables().to(x.device)
        if len(table) == 1:
            frequencies = table[0]
        else:
            sizes = torch.tensor(self.rope_scaling.grid_sizes[:-1], device=position_ids.device)  # type: ignore[index]
            index = torch.bucketize(grid_lengths(position_ids), sizes)
            frequencies = table[index, torch.arange(index.shape[-1], device=index.device)]
        angles = position_ids[..., None].to(frequencies.dtype) * frequencies
        cos, sin = (
            self.recomposition_frequencies(part * self.attention_scaling)  # type: ignore[operator]
            for part in (angles.cos(), angles.sin())
        )
        tower: Any = tower_of(self)
        return (cos.to(x.dtype), sin.to(x.dtype)) if tower.casts else (cos, sin)

    def frequency_tables(self) -> torch.Tensor:
        """Return the (grid sizes or 1, columns, F) frequencies in use."""
        tower: Any = tower_of(self)
        frequencies: Any = self._buffers[tower.buffer]
        if not self.rope_scaling.learned:
            return frequencies
        return frequencies * _on_columns(self.log_scale, self.rope_scaling, tower, 0.0).exp()

    def _table(self, frequencies: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        if self.rope_scaling.learned:
            return frequencies
        return (frequencies.double() * factors.to(frequencies.device)).float()


class MovingComplexRotary(MovingRotary):
    """Frequencies that change between calls, for a module that returns finished rotations."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the complex rotations as the stock module does, with gradients to a learned table."""
        return _rotations(self.config, self.frequency_tables()[0].to(hidden_states.device))


# By whether the module holds finished rotations, and whether its frequencies change between calls.
MIXINS = {
    (False, False): ScaledRotary,
    (False, True): MovingRotary,
    (True, False): ScaledComplexRotary,
    (True, True): MovingComplexRotary,
}


@functools.cache
def scaled_class(stock_class: type, mixin: type) -> type:
    """Return the scaled subclass of a stock rotary class; transformers knows rotary modules by their class name."""
    namespace = {"stock_class": stock_class, "__module__": __name__, "__doc__": mixin.__doc__}
    return type(f"Scaled{stock_class.__name__}", (mixin, stock_class), namespace)


def grid_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return for every patch the size of its grid along every axis.

    Args:
        position_ids: (N, 2) of images or frames one after another, each starting with its corner (0, 0).

    Returns:
        (N, 2) long.
    """
    image = ((position_ids == 0).all(-1).cumsum(0) - 1)[:, None].expand_as(position_ids)
    last = torch.zeros_like(position_ids).scatter_reduce(0, image, position_ids, "amax")
    return last.gather(0, image) + 1


def _on_columns(rows: torch.Tensor, scaling: RopeScaling, tower: RotaryTower, other: float) -> torch.Tensor:
    """(tables, scaled axes, F) rows on the columns of the position ids, `other` where an axis is not scaled."""
    fill = torch.full_like(rows[:, 0], other)
    axes = scaling.scaled_axes
    return torch.stack([rows[:, axes.index(name)] if name in axes else fill for name in tower.columns], dim=1)


def _column_factors(tower: RotaryTower, scaling: RopeScaling, count: int) -> torch.Tensor:
    """Return the (tables, columns, F) factors of a tower with `count` frequencies."""
    return _on_columns(scaling.factors(tower.ratios(count)), scaling, tower, 1.0)


def _rotations(config: Any, frequencies: torch.Tensor) -> torch.Tensor:
    """(2, F) frequencies of x and y as Llama 4's (patches + 1, 1, 2F) complex table; the class token stays put."""
    side = config.image_size // config.patch_size
    rows, columns = torch.meshgrid(*[torch.arange(1, side + 1, device=frequencies.device)] * 2, indexing="ij")
    positions = nn.functional.pad(torch.stack([columns.flatten(), rows.flatten()], -1), (0, 0, 0, 1))
    angles = (positions[..., None] * frequencies).flatten(1)[:, None]
    return torch.view_as_complex(torch.stack([angles.cos(), angles.sin()], dim=-1))


def _new_scaled(stock_class: type, mixin: type) -> nn.Module:
    cls: Any = scaled_class(stock_class, mixin)
    return cls.__new__(cls)
