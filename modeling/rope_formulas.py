"""Which factor every frequency of a vision tower's rotary table is multiplied by.

Frequency i of an axis with d rotated channels is theta_i = base^(-2i/d); its *ratio* is r = 2i/d, 0 for the highest
frequency and just below 1 for the lowest. A scaling turns the angle ``position * theta_i`` into
``position * theta_i * g(r)``:

    poly     g = 1 + alpha r^p
    sigmoid  g = 1 + alpha / (1 + exp(-slope (r - midpoint)))
    linear   g = 1 + alpha r
    exp      g = gamma^r
    table    g = one number per frequency, given or learned

``exp`` is also what other names stand for: a table rebuilt with base b is ``gamma = base / b``, and
``g = theta_i^(-beta)`` is ``gamma = base^beta``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch

# Parameters of each type in the order of the string form, with their defaults.
PARAMETERS: dict[str, dict[str, float]] = {
    "poly": {"alpha": 99.0, "p": 8.0},
    "sigmoid": {"alpha": 99.0, "midpoint": 0.6, "slope": 40.0},
    "linear": {"alpha": 1.0},
    "exp": {"gamma": 2.0},
    "table": {"alpha": 99.0, "p": 8.0},
}
AXES: dict[str, tuple[str, ...]] = {"both": ("h", "w"), "h": ("h",), "w": ("w",)}
# Exclusive lower bounds that keep every factor positive; other parameters only have to be finite.
LOWER_BOUNDS = {"alpha": -1.0, "p": 0.0, "gamma": 0.0}


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotary frequencies of a vision tower.

    Attributes:
        type: ``poly``, ``sigmoid``, ``linear``, ``exp`` or ``table``.
        alpha: strength of ``poly``, ``sigmoid`` and ``linear``, above -1; 0 changes nothing.
        p: exponent of ``poly``, above 0.
        midpoint: ratio at which ``sigmoid`` reaches half its strength.
        slope: steepness of ``sigmoid``.
        gamma: base of ``exp``, above 0; 1 changes nothing.
        axes: ``both``, ``h`` (only the height) or ``w``.
        values: factors of a ``table``, all positive, in the order of the tower's own frequency buffer: (F) numbers
            for every scaled axis and grid size, (axes, F) per axis (h before w), or (grid sizes, axes, F).
        learned: the factors of a ``table`` are parameters of the model; without `values` they start at the
            ``poly`` of `alpha` and `p`.
        grid_sizes: a ``table`` per size of the patch grid, ascending: an axis of n patches uses the table of the
            first size >= n, or the last table.

    Parameters that are not given take the defaults of ``PARAMETERS``.

    Raises:
        ValueError: an unknown type or axis, a parameter of another type or out of range, or a malformed table.
    """

    type: str = "poly"
    alpha: float | None = None
    p: float | None = None
    midpoint: float | None = None
    slope: float | None = None
    gamma: float | None = None
    axes: str = "both"
    values: tuple | None = None
    learned: bool = False
    grid_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the settings and fill in defaults."""
        if self.type not in PARAMETERS:
            raise ValueError(f"RoPE scaling type {self.type!r} is unknown; known are {', '.join(PARAMETERS)}")
        if self.axes not in AXES:
            raise ValueError(f"RoPE scaling axes {self.axes!r} is unknown; known are {', '.join(AXES)}")
        if self.type == "table":
            self._check_table()
        elif self.values is not None or self.learned or self.grid_sizes is not None:
            raise ValueError(f"values, learned and grid_sizes belong to type 'table', but type is {self.type!r}")
        self._check_parameters()

    @property
    def is_identity(self) -> bool:
        """Whether every factor is one, now and for good."""
        if self.type == "table":
            return not self.learned and self.values is not None and bool((_as_tensor(self.values) == 1).all())
        return self.gamma == 1 if self.type == "exp" else self.alpha == 0

    @property
    def scaled_axes(self) -> tuple[str, ...]:
        """The scaled axes, h before w."""
        return AXES[self.axes]

    def factors(self, ratios: torch.Tensor) -> torch.Tensor:
        """Return the factors g.

        Args:
            ratios: (F) the ratio 2i/d of every frequency.

        Returns:
            (grid sizes or 1, scaled axes, F) float64.

        Raises:
            ValueError: the table has another number of frequencies.
        """
        ratios = ratios.double()
        tables, axes = len(self.grid_sizes or (0,)), len(self.scaled_axes)
        if self.values is None:
            return self._formula(ratios).expand(tables, axes, -1)
        values = _as_tensor(self.values)
        if values.shape[-1] != len(ratios):
            raise ValueError(f"values has {values.shape[-1]} frequencies, but the tower has {len(ratios)}")
        return values.to(ratios.device).expand(tables, axes, -1)

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from nothing as a JSON-ready dict; ``from_any`` reads it back."""
        settings: dict[str, Any] = {"type": self.type, "axes": self.axes}
        settings |= {name: value for name in PARAMETERS[self.type] if (value := getattr(self, name)) is not None}
        if self.type == "table":
            settings["learned"] = self.learned
            settings["values"] = None if self.values is None else _as_tensor(self.values).tolist()
            settings["grid_sizes"] = None if self.grid_sizes is None else list(self.grid_sizes)
        return settings

    @classmethod
    def from_any(cls, value: RopeScaling | Mapping[str, Any] | str) -> RopeScaling:
        """Read a scaling from an instance, a dict or a string.

        Args:
            value: a string is ``type[:parameter...][:axes]`` with the parameters in the order of ``PARAMETERS``, e.g.
                ``poly:99:8``, ``sigmoid:99:0.5:20:w``, ``exp``; ``table:99:8`` is a learned table that starts there.

        Raises:
            TypeError: for anything else.
            ValueError: for an unknown field or setting.
        """
        if isinstance(value, RopeScaling):
            return value
        if isinstance(value, str):
            value = _parse(value)
        if not isinstance(value, Mapping):
            raise TypeError(f"a RoPE scaling is a RopeScaling, a dict or a string, not {value!r}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"RoPE scaling has no field {', '.join(unknown)}; fields are {', '.join(known)}")
        return cls(**value)

    def __str__(self) -> str:
        """The string form of a formula; a table as its settings."""
        if self.type == "table":
            return f"table(axes={self.axes}, learned={self.learned}, grid_sizes={self.grid_sizes})"
        parts = [self.type, *(_short(getattr(self, name)) for name in PARAMETERS[self.type])]
        return ":".join(parts if self.axes == "both" else [*parts, self.axes])

    def _formula(self, ratios: torch.Tensor) -> torch.Tensor:
        alpha, p, midpoint, slope, gamma = (
            getattr(self, name) for name in ("alpha", "p", "midpoint", "slope", "gamma")
        )
        if self.type == "exp":
            return gamma**ratios
        if self.type == "sigmoid":
            return 1 + alpha * torch.sigmoid(slope * (ratios - midpoint))
        return 1 + alpha * (ratios if self.type == "linear" else ratios**p)

    def _check_parameters(self) -> None:
        own = PARAMETERS[self.type] if self.values is None else {}
        for name in ("alpha", "p", "midpoint", "slope", "gamma"):
            value = getattr(self, name)
            if name not in own:
                if value is not None:
                    why = "values are given" if self.type == "table" else f"of type {self.type!r}"
                    raise ValueError(f"{name}={value!r} is no parameter of this RoPE scaling ({why})")
                continue
            value = own[name] if value is None else value
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
            if value <= LOWER_BOUNDS.get(name, -math.inf):
                raise ValueError(f"{name} must be above {LOWER_BOUNDS[name]:g}, not {value!r}")
            object.__setattr__(self, name, float(value))

    def _check_table(self) -> None:
        if self.grid_sizes is not None:
            sizes = tuple(self.grid_sizes)
            whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
            if not sizes or not whole or any(a >= b for a, b in pairwise(sizes)):
                raise ValueError(f"grid_sizes must be ascending positive whole numbers, not {self.grid_sizes!r}")
            object.__setattr__(self, "grid_sizes", sizes)
        if self.values is None:
            if not self.learned:
                raise ValueError("a table that is not learned needs values")
            return
        values = _as_tensor(self.values)
        full = (len(self.grid_sizes or (0,)), len(self.scaled_axes))
        if values.ndim not in (1, 2, 3) or values.numel() == 0 or values.shape[:-1] != full[3 - values.ndim :]:
            raise ValueError(
                f"values has shape {tuple(values.shape)}; accepted are (F,), {(*full[1:], 'F')} and {(*full, 'F')} "
                f"for axes={self.axes!r} and grid_sizes={self.grid_sizes}"
            )
        if not bool((values > 0).all() & values.isfinite().all()):
            raise ValueError(f"values must be positive and finite, not {self.values!r}")
        object.__setattr__(self, "values", _as_tuple(values.tolist()))


def _parse(text: str) -> dict[str, Any]:
    """Split ``type[:parameter...][:axes]``."""
    kind, *rest = text.split(":")
    settings: dict[str, Any] = {"type": kind}
    if rest and rest[-1] in AXES:
        settings["axes"] = rest.pop()
    if kind == "table":
        settings["learned"] = True
    names = list(PARAMETERS.get(kind, ()))
    if kind in PARAMETERS and len(rest) > len(names):
        raise ValueError(f"RoPE scaling {text!r} has {len(rest)} numbers, but {kind!r} takes {', '.join(names)}")
    for name, number in zip(names, rest, strict=False):
        try:
            settings[name] = float(number)
        except ValueError:
            raise ValueError(
                f"{name}={number!r} in RoPE scaling {text!r} is no number; the form is type:parameters[:axes] "
                f"with axes {', '.join(AXES)}"
            ) from None
    return settings


def _short(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return text if float(text := f"{number:g}") == number else repr(number)


def _as_tensor(values: Any) -> torch.Tensor:
    """Nested numbers as a float64 tensor on the CPU."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu()
    try:
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be nested sequences of numbers of equal lengths, not {values!r}") from error


def _as_tuple(values: Any) -> Any:
    return tuple(map(_as_tuple, values)) if isinstance(values, Sequence) else values
