"""Run-length compression of visual tokens as pure tensor code: no strings, no per-token Python, no model.

A picture is read as one vocabulary id per cell (see ``visual_decoder``). Neighbouring cells that read the same form a
run; a run becomes one token, or none when every cell of it reads as punctuation. Source: "Reading Images Like Texts"
(arXiv 2509.19191), token compression, with the state machine written down so that every choice is an option.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

METHODS = ("none", "rle", "rle_drop_top1", "rle_drop_top2")
POOLINGS = ("mean", "first", "random")
POSITION_POLICIES = ("original", "compact")
COMPARISONS = ("id", "text")
DROP_SCOPES = ("run", "first")
PAPER_PREFIX = "paper:"


@dataclass(frozen=True)
class CompressionConfig:
    """How visual tokens are compressed.

    Args:
        method: ``none`` keeps every token; ``rle`` merges runs (paper method 1); ``rle_drop_top1`` also drops runs
            whose best reading is meaningless (paper method 2); ``rle_drop_top2`` drops them only if the two best
            readings are (paper method 3).
        pooling: vector that stands for a run: the ``mean`` of its cells, its ``first`` cell, or one ``random`` cell
            (seeded, and independent of what else is in the batch).
        position_policy: ``original`` keeps the position (1-D, or time/height/width) of the run's anchor cell;
            ``compact`` renumbers the shortened prompt 0..L'-1 as the paper does. With M-RoPE all three axes then hold
            that same 1-D index, so 2-D image positions are lost.
        wrap_rows: whether a run may continue at the start of the next grid row.
        compare: ``id`` merges equal vocabulary ids; ``text`` merges ids whose stripped text is equal.
        drop_scope: ``run`` drops a run only if every cell of it is meaningless; ``first`` looks at its first cell only
            (the paper's rule).
        min_keep: tokens that every feature block (image or tile) keeps at least, if it has that many runs.
        seed: seed of ``random`` pooling.

    Raises:
        ValueError: for an unknown choice, naming the accepted ones.
    """

    method: str = "rle"
    pooling: str = "mean"
    position_policy: str = "original"
    wrap_rows: bool = False
    compare: str = "id"
    drop_scope: str = "run"
    min_keep: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (
            ("method", METHODS),
            ("pooling", POOLINGS),
            ("position_policy", POSITION_POLICIES),
            ("compare", COMPARISONS),
            ("drop_scope", DROP_SCOPES),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(
                    f"compression option {name}={value!r} is unknown; choose one of {', '.join(accepted)}"
                )
        for name in ("min_keep", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"compression option {name}={value!r} must be an integer of at least 0")
        if not isinstance(self.wrap_rows, bool):
            raise ValueError(f"compression option wrap_rows={self.wrap_rows!r} must be True or False")

    @property
    def top_k(self) -> int:
        """Readings per cell that the method needs."""
        return 2 if self.method == "rle_drop_top2" else 1

    @property
    def needs_token_tables(self) -> bool:
        """Whether a tokenizer's ``meaningless`` or ``text_class`` table is needed."""
        return self.method.startswith("rle_drop") or self.compare == "text"

    @classmethod
    def paper(cls, method: str = "rle") -> "CompressionConfig":
        """Return the published behaviour of one method.

        String comparison, runs that wrap over grid rows, compact positions, a random member per run, first-cell drop
        rule. Not reproduced: the public code also lets runs wrap from one image or tile to the next.
        """
        return cls(
            method=method,
            pooling="random",
            position_policy="compact",
            wrap_rows=True,
            compare="text",
            drop_scope="first",
        )

    @classmethod
    def from_any(cls, value: "CompressionConfig | dict[str, Any] | str | None") -> "CompressionConfig":
        """Read a configuration from ``None`` (off), a method name, ``"paper:<method>"``, a dict or a configuration.

        Raises:
            ValueError: for an unknown method, option or type.
        """
        if value is None:
            return cls(method="none")
        if isinstance(value, str):
            if value.startswith(PAPER_PREFIX):
                return cls.paper(value.removeprefix(PAPER_PREFIX))
            return cls(method=value)
        if isinstance(value, dict):
            names = {field.name for field in dataclasses.fields(cls)}
            unknown = sorted(set(value) - names)
            if unknown:
                raise ValueError(f"compression has unknown options {unknown}; accepted are {sorted(names)}")
            return cls(**value)
        if isinstance(value, (list, tuple)) and value and all(choice == value[0] for choice in value):
            return cls.from_any(value[0])  # batches that are collated row by row (pipelines) repeat the choice
        # A checkpoint's copy of this file defines its own class of the same name: compare by shape, not identity.
        if dataclasses.is_dataclass(value) and type(value).__name__ == cls.__name__:
            return cls(**dataclasses.asdict(value))
        raise ValueError(
            f"compression={value!r} of type {type(value).__name__} is not understood; give None, a method name "
            f"({', '.join(METHODS)}), 'paper:<method>', a dict of options or a CompressionConfig"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a plain dict that ``from_any`` reads back."""
        return dataclasses.asdict(self)


@dataclass
class RunLengthPlan:
    """Which cells stay together, which are dropped, and where the kept runs sit.

    Attributes:
        segment: (N,) long, index of the kept run of every cell, -1 if the cell is dropped.
        anchor: (M,) long ascending, the cell that represents each kept run (its position is used).
        kept_per_block: (n_blocks,) long, kept runs of every feature block.
        run: (N,) long, index of the run of every cell, dropped runs included.
    """

    segment: torch.Tensor
    anchor: torch.Tensor
    kept_per_block: torch.Tensor
    run: torch.Tensor

    @property
    def num_cells(self) -> int:
        """Cells before compression, N."""
        return self.segment.shape[0]

    @property
    def num_kept(self) -> int:
        """Tokens after compression, M."""
        return self.anchor.shape[0]

    @property
    def is_identity(self) -> bool:
        """Whether every cell is kept by itself."""
        return self.num_kept == self.num_cells

    @property
    def dropped(self) -> torch.Tensor:
        """(N,) bool, cells of dropped runs."""
        return self.segment < 0

    @cached_property
    def runs(self) -> torch.Tensor:
        """(R, 2) long: first cell and length of every run, dropped runs included, in raster order."""
        _, lengths = torch.unique_consecutive(self.run, return_counts=True)
        return torch.stack([lengths.cumsum(0) - lengths, lengths], dim=1)

    def cpu(self) -> "RunLengthPlan":
        """Return the same plan with its tensors on the CPU."""
        return RunLengthPlan(self.segment.cpu(), self.anchor.cpu(), self.kept_per_block.cpu(), self.run.cpu())


def run_length_plan(
    ids: torch.Tensor,
    grids: torch.Tensor,
    config: CompressionConfig,
    meaningless: torch.Tensor | None = None,
    text_class: torch.Tensor | None = None,
) -> RunLengthPlan:
    """Group the cells of one batch of images into runs and decide which runs are kept.

    All images of a batch are planned at once; runs never cross a feature block (an image or a tile). O(N) integer
    operations on the device of `ids`; the only host synchronisation is the final number of kept runs.

    Args:
        ids: (N, k) long, the k best readings of every cell, blocks one after the other in raster order.
        grids: (n_blocks, 2) long, height and width of every block in cells; sum(h * w) = N.
        config: the options. ``method="none"`` keeps every cell.
        meaningless: (V,) bool, needed by the ``rle_drop_*`` methods.
        text_class: (V,) long, needed by ``compare="text"``.

    Returns:
        The plan, on the device of `ids`.

    Raises:
        ValueError: if shapes disagree, or a table or a second reading that the method needs is absent.
    """
    _check_plan_inputs(ids, grids, config, meaningless, text_class)
    device, num_cells = ids.device, ids.shape[0]
    cells = torch.arange(num_cells, device=device)
    if config.method == "none":
        return RunLengthPlan(cells, cells, (grids[:, 0] * grids[:, 1]).to(device), cells)
    block, in_block, column = _cell_coordinates(grids, num_cells, device)

    key = ids[:, 0] if config.compare == "id" or text_class is None else text_class[ids[:, 0]]
    boundary = in_block == 0
    boundary[1:] |= key[1:] != key[:-1]
    if not config.wrap_rows:
        boundary |= column == 0
    run = boundary.cumsum(0) - 1

    # Per-run values live in N slots (there are at most N runs), so that no shape depends on the data.
    length = torch.zeros_like(cells).scatter_add_(0, run, torch.ones_like(cells))
    start = torch.full_like(cells, num_cells).scatter_reduce_(0, run, cells, "amin").clamp(max=max(num_cells - 1, 0))
    keep = (length > 0) & ~_droppable(ids, run, length, start, config, meaningless)
    keep = _restore_minimum(keep, length > 0, block[start], len(grids), config.min_keep)

    anchor = (start + _anchor_offset(length, in_block[start], config))[keep]
    segment = torch.where(keep, keep.cumsum(0) - 1, -1)[run]
    kept_per_block = torch.zeros(len(grids), dtype=torch.long, device=device).scatter_add_(
        0, block[start], keep.long()
    )
    return RunLengthPlan(segment, anchor, kept_per_block, run)


def merge_features(features: torch.Tensor, plan: RunLengthPlan, pooling: str) -> torch.Tensor:
    """Pool the features of every kept run.

    Args:
        features: (N, D) floating point, one row per cell.
        plan: the grouping.
        pooling: ``mean`` averages in float32 and casts back, leaving runs of one cell untouched bit for bit; ``first``
            and ``random`` take the anchor cell, which the plan chose accordingly.

    Returns:
        (M, D) of the dtype of `features`; gradients flow.

    Raises:
        ValueError: if the number of rows or the pooling is wrong.
    """
    if features.shape[0] != plan.num_cells:
        raise ValueError(f"features has {features.shape[0]} rows but the plan covers {plan.num_cells} cells")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    anchors = features[plan.anchor]
    if pooling != "mean" or plan.is_identity:
        return anchors
    # Dropped cells are added to one extra row that is cut off again.
    target = torch.where(plan.dropped, plan.num_kept, plan.segment)
    total = features.new_zeros(plan.num_kept + 1, features.shape[1], dtype=torch.float32)
    total = total.index_add(0, target, features.float())[:-1]
    length = torch.zeros(plan.num_kept + 1, device=features.device)
    length = length.index_add(0, target, torch.ones_like(target, dtype=length.dtype))[:-1, None]
    return torch.where(length > 1, (total / length.clamp(min=1)).to(features.dtype), anchors)


def _check_plan_inputs(
    ids: torch.Tensor,
    grids: torch.Tensor,
    config: CompressionConfig,
    meaningless: torch.Tensor | None,
    text_class: torch.Tensor | None,
) -> None:
    if ids.ndim != 2:
        raise ValueError(f"ids must have shape (cells, readings), got {tuple(ids.shape)}")
    if grids.ndim != 2 or grids.shape[1] != 2:
        raise ValueError(f"grids must have shape (blocks, 2), got {tuple(grids.shape)}")
    covered = int((grids[:, 0] * grids[:, 1]).sum())
    if covered != ids.shape[0]:
        raise ValueError(f"grids cover {covered} cells but ids has {ids.shape[0]} rows")
    if ids.shape[1] < config.top_k:
        raise ValueError(f"method {config.method!r} needs {config.top_k} readings per cell, ids has {ids.shape[1]}")
    if config.method.startswith("rle_drop") and meaningless is None:
        raise ValueError(
            f"method {config.method!r} needs the table `meaningless`; build it with token_tables(tokenizer)"
        )
    if config.method != "none" and config.compare == "text" and text_class is None:
        raise ValueError("compare='text' needs the table `text_class`; build it with token_tables(tokenizer)")


def _cell_coordinates(
    grids: torch.Tensor, num_cells: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for every cell its block, its index within the block and its column, each (N,) long."""
    grids = grids.to(device)
    size = grids[:, 0] * grids[:, 1]
    block = torch.repeat_interleave(torch.arange(len(grids), device=device), size, output_size=num_cells)
    in_block = torch.arange(num_cells, device=device) - (size.cumsum(0) - size)[block]
    return block, in_block, in_block % grids[:, 1][block].clamp(min=1)


def _droppable(
    ids: torch.Tensor,
    run: torch.Tensor,
    length: torch.Tensor,
    start: torch.Tensor,
    config: CompressionConfig,
    meaningless: torch.Tensor | None,
) -> torch.Tensor:
    """Return (N,) bool over run slots: may the run be dropped?"""
    if meaningless is None or not config.method.startswith("rle_drop"):
        return torch.zeros_like(length, dtype=torch.bool)
    empty = meaningless[ids[:, : config.top_k]].all(dim=1)
    if config.drop_scope == "first":
        return empty[start]
    return torch.zeros_like(length).scatter_add_(0, run, empty.long()) == length


def _restore_minimum(
    keep: torch.Tensor, exists: torch.Tensor, block: torch.Tensor, num_blocks: int, min_keep: int
) -> torch.Tensor:
    """Keep the first dropped runs of every block that would otherwise have fewer than `min_keep` tokens."""
    if min_keep == 0:
        return keep
    kept = torch.zeros(num_blocks, dtype=torch.long, device=keep.device).scatter_add_(0, block, keep.long())
    dropped = exists & ~keep
    rank = dropped.cumsum(0) - dropped.long()  # dropped runs before this one, over all blocks
    first_rank = torch.full_like(kept, keep.shape[0]).scatter_reduce_(
        0, block, torch.where(dropped, rank, keep.shape[0]), "amin"
    )
    return keep | (dropped & (rank - first_rank[block] < (min_keep - kept)[block]))


def _anchor_offset(length: torch.Tensor, in_block: torch.Tensor, config: CompressionConfig) -> torch.Tensor:
    """Return (N,) long over run slots: the anchor's offset from the first cell of the run.

    A mean is anchored at the middle cell, whose position is the nearest to the run's centre.
    """
    if config.pooling == "first":
        return torch.zeros_like(length)
    if config.pooling == "mean":
        return (length - 1).clamp(min=0) // 2
    return (_hash32(in_block, config.seed) * length) >> 32  # a uniform integer in 0..length-1


def _hash32(index: torch.Tensor, seed: int) -> torch.Tensor:
    """Map indices to reproducible long values in 0..2^32-1, the same on every device and in every batch.

    A counter-based generator (xor-shift-multiply integer hash), because a stateful one would make a row's result
    depend on the rows before it.
    """
    mask = 0xFFFFFFFF
    x = (index + (seed * 0x9E3779B1 + 0x7F4A7C15) % (mask + 1)) & mask
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & mask
    return x ^ (x >> 16)
