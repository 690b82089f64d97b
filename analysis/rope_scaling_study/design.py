"""What the study does, as data: pictures, scalings, arms. A YAML file holds the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("default.yaml")
IN, TUNED, OUT = "in", "tuned", "out"
DISTRIBUTIONS = (IN, TUNED, OUT)
FORMS = ("two-way", "four-way")
STOCK, SCALED = "stock", "scaled"
PLAIN_ARMS = (STOCK, SCALED, "permuted", "random", "high-frequency", "rebase", "lowered", "h-only", "w-only")
TUNED_ARMS = (*PLAIN_ARMS, "table")
# Settings that only add units of work: a study may be taken up again with others.
NOT_PART_OF_THE_STUDY = ("seeds", "draws", "plain_arms", "tuned_arms")


@dataclass(frozen=True)
class Condition:
    """How the pictures of a set are made from its scenes.

    Attributes:
        name: what it is called.
        distribution: ``in`` if the model was trained on such pictures, ``tuned`` if only fine-tuning shows them,
            ``out`` if neither does.
        scale: size of the arrangement of the two objects, as a share of the shorter side.
        aspect: width divided by height; a value above 1 is turned upright in every other set.
        pixels: length of the shorter side.
        mirrored: whether the mirror images are asked about too.
    """

    name: str
    distribution: str
    scale: float = 1.0
    aspect: float = 1.0
    pixels: int = 96
    mirrored: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming the field, what was given and what is accepted.
        """
        if self.distribution not in DISTRIBUTIONS:
            accepted = ", ".join(DISTRIBUTIONS)
            raise ValueError(f"distribution={self.distribution!r} is not accepted; accepted are {accepted}.")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale} of condition {self.name!r} must lie above 0 and be at most 1.")
        if not 1 <= self.aspect <= 5:
            raise ValueError(f"aspect={self.aspect} of condition {self.name!r} must lie between 1 and 5.")
        if self.pixels < 8:
            raise ValueError(f"pixels={self.pixels} of condition {self.name!r} must be at least 8.")

    @property
    def area(self) -> int:
        """Pixels of a picture."""
        return round(self.pixels * self.aspect) * self.pixels


@dataclass(frozen=True)
class Study:
    """Everything the study depends on.

    Attributes:
        model: embedded name, folder or Hub id.
        conditions: the kinds of pictures.
        forms: how questions are put, the first is the one the conclusion is about. ``four-way`` names all relations;
            ``two-way`` only the two of the right axis.
        grid: type -> parameter -> values; their combinations are tried without fine-tuning.
        tuned_grid: scalings tried with fine-tuning, beside the one chosen without.
        validation_sets: sets of four pictures per condition to choose by.
        test_sets: sets per condition to report on.
        non_spatial: test questions about presence, attributes and counts.
        seeds: fine-tuning runs per arm.
        draws: draws of each random control without fine-tuning.
        plain_arms: arms without fine-tuning.
        tuned_arms: arms with fine-tuning.
        sft: settings of ``VisionSFTConfig``.
        sft_sets: training sets per condition that is not ``out``.
        batch_size: questions per forward pass.
        resamples: bootstrap samples.
    """

    model: str = "tiny-qwen2-vl"
    conditions: tuple[Condition, ...] = ()
    forms: tuple[str, ...] = FORMS
    grid: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    tuned_grid: tuple[str, ...] = ()
    validation_sets: int = 16
    test_sets: int = 60
    non_spatial: int = 150
    seeds: int = 3
    draws: int = 3
    plain_arms: tuple[str, ...] = PLAIN_ARMS
    tuned_arms: tuple[str, ...] = (STOCK, SCALED)
    sft: Mapping[str, Any] = field(default_factory=dict)
    sft_sets: int = 1000
    batch_size: int = 40
    resamples: int = 2000

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: naming the field, what was given and what is accepted.
        """
        if not self.conditions or not any(c.distribution == IN for c in self.conditions):
            raise ValueError("conditions must hold at least one whose distribution is 'in'.")
        if len({c.name for c in self.conditions}) < len(self.conditions):
            raise ValueError("conditions must have different names.")
        for name, accepted in (("forms", FORMS), ("plain_arms", PLAIN_ARMS), ("tuned_arms", TUNED_ARMS)):
            unknown = [value for value in getattr(self, name) if value not in accepted]
            if unknown or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is not accepted; accepted are {', '.join(accepted)}.")
        for name in ("validation_sets", "test_sets", "seeds", "draws", "sft_sets", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("plain_arms", "tuned_arms"):
            if STOCK not in getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} lacks 'stock', which all others are compared with.")
        self.candidates()

    def candidates(self) -> list[str]:
        """The scalings of the grid as strings, without those that change nothing.

        Raises:
            ValueError: a type or a parameter is not accepted, or nothing is left.
        """
        from dualstream.modeling import RopeScaling

        found: dict[str, None] = {}
        for kind, parameters in self.grid.items():
            for values in product(*parameters.values()):
                scaling = RopeScaling.from_any({"type": kind, **dict(zip(parameters, values, strict=True))})
                if not scaling.is_identity:
                    found[str(scaling)] = None
        if not found:
            raise ValueError(f"grid={dict(self.grid)!r} holds no scaling that changes anything.")
        return list(found)

    def names(self, place: str) -> list[str]:
        """The conditions of a distribution, or the condition of that name."""
        return [c.name for c in self.conditions if place in (c.name, c.distribution)]

    def settings(self) -> dict[str, Any]:
        """What identifies the study, JSON-serialisable."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_PART_OF_THE_STUDY}

    def limited(self, limit: int) -> Study:
        """The same study on at most `limit` sets per condition, for a quick look."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("validation_sets", "test_sets", "sft_sets"):
            values[name] = min(values[name], limit)
        values["non_spatial"] = min(self.non_spatial, 4 * limit)
        return Study(**values)


def read_study(path: Path | None = None, **changes: Any) -> Study:
    """Read a study from a YAML file.

    Args:
        path: the file; the one that comes with the package by default.
        **changes: fields that take precedence; None leaves the file's value.

    Raises:
        ValueError: there is no such file, or a field is unknown or not accepted.
    """
    import yaml

    path = path or DEFAULT
    if not path.is_file():
        raise ValueError(f"config={str(path)!r} is no file.")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    values |= {name: value for name, value in changes.items() if value is not None}
    known = [f.name for f in fields(Study)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path} has unknown fields {', '.join(unknown)}; fields are {', '.join(known)}.")
    values["conditions"] = tuple(Condition(**row) for row in values.get("conditions", ()))
    for name in ("forms", "tuned_grid", "plain_arms", "tuned_arms"):
        if name in values:
            values[name] = tuple(values[name])
    return Study(**values)
