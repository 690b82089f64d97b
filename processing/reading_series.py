"""One picture read several times: by depth of the vision tower, by depth of the language model, by lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .token_boxes import TokenGeometry

if TYPE_CHECKING:
    from .token_map import TokenMap

METHODS = ("rle", "rle_drop_top1", "rle_drop_top2")


class ReadingPoint(NamedTuple):
    """Where a model was read.

    Attributes:
        vision: blocks of the vision tower that were run; None if that was not varied.
        llm: blocks of the language model that were run; None at the connector's output.
        lens: what else tells points of equal depths apart, as shown.
    """

    vision: int | None = None
    llm: int | None = None
    lens: str = ""


@dataclass(frozen=True, eq=False)
class CompressionPlans:
    """What one compression does at each of D points.

    Attributes:
        name: of the method, as shown.
        run: (D, N) int64, index of every cell's run.
        kept: (D, N) bool, whether the cell's run is kept.
        anchor: (D, N) bool, whether the cell stands for its run.
    """

    name: str
    run: np.ndarray
    kept: np.ndarray
    anchor: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """(D,) int64, visual tokens that are left."""
        return self.anchor.sum(axis=1)


@dataclass(frozen=True, eq=False)
class ReadingSeries:
    """The readings of one picture by one model.

    Attributes:
        name: of the model, as shown.
        points: the D points it was read at, each once.
        ids: (D, N, k) vocabulary ids, best first.
        pieces: text of every id, with its leading blank.
        geometry: where the N visual tokens look.
        scores: (D, N, k) natural log-probabilities, or None.
        start: index of the point that is shown first.
        native_vision: the vision depth that the model itself reads, if known.
        plans: compressions to show.
        tracked: word -> (D, N) log-probability of that word in every cell, whether among the k best or not.
    """

    name: str
    points: tuple[ReadingPoint, ...]
    ids: np.ndarray
    pieces: Mapping[int, str]
    geometry: TokenGeometry
    scores: np.ndarray | None = None
    start: int = 0
    native_vision: int | None = None
    plans: tuple[CompressionPlans, ...] = ()
    tracked: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (len(self.points), len(self.geometry))
        if not self.points or len(set(self.points)) != len(self.points):
            raise ValueError(f"points must be at least one, each once; got {list(self.points)}.")
        if self.ids.ndim != 3 or self.ids.shape[:2] != expected or self.ids.shape[2] < 1:
            raise ValueError(
                f"ids must be (points, cells, k) with (points, cells) = {expected}, got {self.ids.shape}."
            )
        if self.scores is not None and self.scores.shape != self.ids.shape:
            raise ValueError(f"scores must have the shape of ids {self.ids.shape}, got {self.scores.shape}.")
        if not 0 <= self.start < len(self.points):
            raise ValueError(f"start must be one of the {len(self.points)} points, got {self.start}.")
        for plan in self.plans:
            shapes = {plan.run.shape, plan.kept.shape, plan.anchor.shape}
            if shapes != {expected}:
                raise ValueError(f"compression {plan.name!r} must cover (points, cells) = {expected}, got {shapes}.")
        for word, values in self.tracked.items():
            if values.shape != expected:
                raise ValueError(f"tracked word {word!r} must be {expected}, got {values.shape}.")
        if self.scores is None and self.tracked:
            raise ValueError("tracked words need scores, too.")

    @classmethod
    def from_token_map(cls, token_map: TokenMap, name: str = "") -> ReadingSeries:
        """The single reading of a token map, with its compression if it has one.

        Raises:
            ValueError: if the map has no geometry.
        """
        if token_map.geometry is None:
            raise ValueError("the token map has no geometry; make it with token_geometry(processor, image.size).")
        plans: tuple[CompressionPlans, ...] = ()
        if token_map.run is not None and token_map.anchor is not None:
            anchor = np.isin(np.arange(len(token_map)), token_map.anchor)
            method = (token_map.compression or {}).get("method", "compressed")
            plans = (CompressionPlans(method, token_map.run[None], token_map.keeps[None], anchor[None]),)
        return cls(
            name=name,
            points=(ReadingPoint(),),
            ids=token_map.ids[None],
            pieces=token_map.pieces,
            geometry=token_map.geometry,
            scores=None if token_map.scores is None else token_map.scores[None],
            plans=plans,
        )

    @cached_property
    def used_ids(self) -> np.ndarray:
        """(P,) int64 vocabulary ids that occur, ascending."""
        return np.unique(self.ids).astype(np.int64)


def plan_methods(
    ids: np.ndarray, grids: Sequence[tuple[int, int]], tables: tuple[Any, Any], methods: Sequence[Any] = METHODS
) -> tuple[CompressionPlans, ...]:
    """Plan compressions at every point, all at once.

    Args:
        ids: (D, N, k) readings; methods that need more than k of them are left out.
        grids: (rows, cols) of every feature block of the picture.
        tables: ``meaningless`` and ``text_class`` of ``modeling.token_tables``.
        methods: what ``CompressionConfig.from_any`` takes.

    Returns:
        One entry per method.
    """
    import torch

    from dualstream.modeling import CompressionConfig, run_length_plan

    points, cells, k = ids.shape
    flat = torch.from_numpy(np.ascontiguousarray(ids.reshape(points * cells, k), dtype=np.int64))
    # runs never cross a feature block, so the points can follow each other like the images of a batch
    blocks = torch.tensor([tuple(grid) for grid in grids]).repeat(points, 1)
    plans = []
    for method in methods:
        config = CompressionConfig.from_any(method)
        if config.top_k > k:
            continue
        plan = run_length_plan(flat, blocks, config, *tables)
        run, anchor = plan.run.numpy().reshape(points, cells), np.zeros(points * cells, bool)
        anchor[plan.anchor.numpy()] = True
        kept = (~plan.dropped).numpy().reshape(points, cells)
        name = method if isinstance(method, str) else config.method
        plans.append(CompressionPlans(name, run - run[:, :1], kept, anchor.reshape(points, cells)))
    return tuple(plans)
