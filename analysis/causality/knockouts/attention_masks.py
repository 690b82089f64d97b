"""Attention masks with single edges cut, in whatever form a kernel wants its mask.

A mask arrives at an attention module in one of three forms: none (plain causal attention), booleans (True: may read)
or numbers that are added to the scores. Writing one form into another is how a knockout silently does nothing: False
in a mask of numbers adds 0. Here the form is looked at and kept, and what was cut is checked by `attention_probe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Block:
    """Edges of attention to cut: no destination may read any source.

    Attributes:
        row: row of the batch.
        sources: (s,) columns of the padded prompt that are not to be read (keys).
        destinations: (d,) columns that are not to read them (queries).
        layers: blocks of the language model, counted from 0; None: all.
        heads: query heads; None: all.
        keep_self: whether a column that is both may still read itself.
        later: whether every column after the last destination is a destination, too (tokens generated later).
    """

    row: int
    sources: torch.Tensor
    destinations: torch.Tensor
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    keep_self: bool = True
    later: bool = False

    def __post_init__(self) -> None:
        for name in ("sources", "destinations"):
            columns = torch.as_tensor(getattr(self, name), dtype=torch.long).flatten().cpu()
            if columns.numel() and int(columns.min()) < 0:
                raise ValueError(f"{name} must be columns of the prompt, 0 or more, got {columns.tolist()}.")
            object.__setattr__(self, name, columns.unique())

    def acts_in(self, layer: int) -> bool:
        """Whether anything is cut in a layer."""
        return bool(len(self.sources) and len(self.destinations)) and (self.layers is None or layer in self.layers)


def blocked_edges(
    blocks: Iterable[Block], batch: int, heads: int, queries: Sequence[int] | range, keys: int
) -> torch.Tensor:
    """Edges to cut in one layer.

    Args:
        blocks: those that act in the layer.
        batch: rows of the batch, B.
        heads: query heads, H.
        queries: columns of the queries of this call; after a cached prefix they do not begin at 0.
        keys: columns that can be read, K.

    Returns:
        (B, 1 or H, Q, K) bool, True where reading is forbidden; the second axis is 1 where no block names heads.

    Raises:
        ValueError: for a row, head or column that does not exist.
    """
    blocks = list(blocks)
    by_head = any(block.heads is not None for block in blocks)
    edges = torch.zeros(batch, heads if by_head else 1, len(queries), keys, dtype=torch.bool)
    columns = torch.arange(keys)
    query_columns = torch.as_tensor(list(queries))
    for block in blocks:
        _check(block, batch, heads, keys)
        forbidden = torch.zeros(len(queries), keys, dtype=torch.bool)
        to = torch.isin(query_columns, block.destinations)
        if block.later:
            to |= query_columns > block.destinations.max()
        forbidden[:, block.sources[block.sources < keys]] = True
        forbidden &= to[:, None]
        if block.keep_self:
            forbidden &= query_columns[:, None] != columns[None, :]
        for head in range(edges.shape[1]) if block.heads is None else block.heads:
            edges[block.row, head] |= forbidden
    return edges


def cut_mask(mask: torch.Tensor | None, edges: torch.Tensor, first_query: int, dtype: torch.dtype) -> torch.Tensor:
    """Cut edges out of an attention mask and keep its form.

    Args:
        mask: as the attention module was given it: None for plain causal attention, or (B or 1, H or 1, Q, K) of
            booleans (True: may read) or of numbers added to the scores.
        edges: (B, H or 1, Q, K) bool, True where reading is forbidden.
        first_query: column of the first query.
        dtype: of the scores; the lowest number of it forbids.

    Returns:
        (B, H or 1, Q, K): booleans for None and for booleans, numbers for numbers.

    Raises:
        ValueError: if a query with a cut edge would be left with nothing to read (softmax would then spread its
            attention over the forbidden columns), or the mask is of another shape or type.
    """
    edges = edges.to(mask.device) if mask is not None else edges
    if mask is None:
        allowed = ~edges & causal(edges.shape[-2], edges.shape[-1], first_query, edges.device)
        _require_readers(allowed, edges)
        return allowed
    if mask.ndim != 4 or mask.shape[-2] != edges.shape[-2] or mask.shape[-1] < edges.shape[-1]:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, knockout needs (batch, heads, "
            f"{edges.shape[-2]}, {edges.shape[-1]})"
        )
    edges = torch.nn.functional.pad(edges, (0, mask.shape[-1] - edges.shape[-1]))
    if mask.dtype == torch.bool:
        allowed = mask & ~edges
        _require_readers(allowed, edges)
        return allowed
    if not mask.is_floating_point():
        raise ValueError(f"the attention mask holds {mask.dtype}; knockout understands booleans and floating point")
    lowest = torch.finfo(mask.dtype).min
    _require_readers((mask > lowest / 2) & ~edges, edges)
    return torch.where(edges, lowest, mask.to(dtype) if mask.dtype != dtype else mask)


def causal(queries: int, keys: int, first_query: int, device: torch.device | None = None) -> torch.Tensor:
    """(1, 1, Q, K) bool: a query reads its own column and all before it."""
    query = torch.arange(first_query, first_query + queries, device=device)
    return (torch.arange(keys, device=device)[None, :] <= query[:, None])[None, None]


def _require_readers(allowed: torch.Tensor, edges: torch.Tensor) -> None:
    stranded = (edges.any(-1) & ~allowed.any(-1)).nonzero()
    if len(stranded):
        row, _, query = stranded[0].tolist()
        raise ValueError(
            f"row {row}: query {query} of this call would have nothing left to read; a knockout must leave every "
            "destination at least one column (keep_self=True leaves it itself)"
        )


def _check(block: Block, batch: int, heads: int, keys: int) -> None:
    if not 0 <= block.row < batch:
        raise ValueError(f"a block names row {block.row}, the batch has rows 0..{batch - 1}.")
    if block.heads is not None and not all(0 <= head < heads for head in block.heads):
        raise ValueError(f"a block names heads {block.heads}, the layer has heads 0..{heads - 1}.")
    reached = int(block.sources.max()) if len(block.sources) else 0
    if reached >= keys:
        raise ValueError(f"a block names source column {reached}, only columns 0..{keys - 1} can be read.")


@dataclass
class KnockoutReport:
    """What a knockout did, as measured by its probe.

    Attributes:
        layers: layers in which something was cut and the probe looked.
        largest_blocked_weight: largest attention weight on a cut edge, over layers, heads, rows and destinations;
            exactly 0, otherwise the run has failed.
        weight_before: mean attention of the destinations on the sources with nothing cut, by layer; what was removed.
        largest_sum_error: how far the weights of a destination were from adding up to 1.
    """

    layers: list[int] = field(default_factory=list)
    largest_blocked_weight: float = 0.0
    weight_before: dict[int, float] = field(default_factory=dict)
    largest_sum_error: float = 0.0
    _measured: dict[int, int] = field(default_factory=dict, repr=False)

    def add_weight_before(self, layer: int, weights: torch.Tensor) -> None:
        """Take measured weights (n,) into the mean of a layer."""
        known = self._measured.get(layer, 0)
        total = self.weight_before.get(layer, 0.0) * known + float(weights.sum())
        self._measured[layer] = known + len(weights)
        self.weight_before[layer] = total / self._measured[layer]
