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
from torch import nn

METHODS = ("none", "rle", "rle_drop_top1", "rle_drop_top2")
POOLINGS = ("mean", "first", "random")
POSITION_POLICIES = ("original", "compact")
COMPARISONS = ("id", "text")
DROP_SCOPES = ("run", "first")
PAPER_PREFIX = "paper:"
CAST_AT_ONCE = 6 * 2**20  # numbers: 24 MB of float32, which malloc hands out again without new page faults


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
        kept_per_block: (n_blocks,) long on the CPU, kept runs of every feature block.
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
    operations on the device of `ids`; the host waits once, for the final numbers of kept runs.

    Args:
        ids: (N, k) long, the k best readings of every cell, blocks one after the other in raster order.
        grids: (n_blocks, 2) long on the CPU, height and width of every block in cells; sum(h * w) = N.
        config: the options. ``method="none"`` keeps every cell.
        meaningless: (V,) bool, needed by the ``rle_drop_*`` methods.
        text_class: (V,) long, needed by ``compare="text"``.

    Returns:
        The plan, on the device of `ids`, with its ``kept_per_block`` on the CPU.

    Raises:
        ValueError: if shapes disagree, or a table or a second reading that the method needs is absent.
    """
    _check_plan_inputs(ids, grids, config, meaningless, text_class)
    if config.method == "none":
        cells = torch.arange(len(ids), device=ids.device)
        return RunLengthPlan(cells, cells, grids.prod(-1).cpu(), cells)
    segment, anchors, kept_per_block, run = _plan_in_slots(ids, grids.to(ids.device), config, meaningless, text_class)
    kept_per_block = kept_per_block.cpu()  # the one value the host waits for
    return RunLengthPlan(segment, anchors[: sum(kept_per_block.tolist())], kept_per_block, run)


def _plan_in_slots(
    ids: torch.Tensor,
    grids: torch.Tensor,
    config: CompressionConfig,
    meaningless: torch.Tensor | None,
    text_class: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `segment`, `anchor`, `kept_per_block` and `run` of a plan; `anchor` is (N + 1,), its end arbitrary.

    Values per run live in N slots (there are at most N runs), so that no shape depends on the data.
    """
    num_cells = ids.shape[0]
    sizes = grids[:, 0] * grids[:, 1]
    blocks = torch.arange(len(grids), device=ids.device)
    block = torch.repeat_interleave(blocks, sizes, output_size=num_cells)
    in_block = torch.arange(num_cells, device=ids.device) - (sizes.cumsum(0) - sizes)[block]

    key = ids[:, 0] if config.compare == "id" or text_class is None else text_class[ids[:, 0]]
    boundary = (in_block if config.wrap_rows else in_block % grids[:, 1][block]) == 0
    boundary[1:] |= key[1:] != key[:-1]
    run = boundary.cumsum(0) - 1

    length = torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))
    start = (length.cumsum(0) - length).clamp(max=max(num_cells - 1, 0))
    keep, block_of_run = length > 0, block[start]
    if meaningless is not None and config.method.startswith("rle_drop"):
        dropped = keep & _droppable(ids, run, length, start, config, meaningless)
        keep = _restore_minimum(keep ^ dropped, dropped, block_of_run, len(grids), config.min_keep)

    rank = keep.cumsum(0) - 1
    segment = torch.where(keep, rank, -1)[run]
    offset = _anchor_offset(length, start, in_block, config)
    anchors = run.new_empty(num_cells + 1).scatter_(0, torch.where(keep, rank, num_cells), start + offset)
    return segment, anchors, torch.zeros_like(sizes).scatter_add_(0, block_of_run, keep.long()), run


def merge_features(features: torch.Tensor, plan: RunLengthPlan, pooling: str) -> torch.Tensor:
    """Pool the features of every kept run.

    Args:
        features: (N, D) floating point, one row per cell.
        plan: the grouping.
        pooling: ``mean`` averages in float32 and casts back, leaving runs of one cell as they are (but for the sign of
            a zero); ``first`` and ``random`` take the anchor cell, which the plan chose accordingly.

    Returns:
        (M, D) of the dtype of `features`; gradients flow.

    Raises:
        ValueError: if the number of rows or the pooling is wrong.
    """
    if features.shape[0] != plan.num_cells:
        raise ValueError(f"features has {features.shape[0]} rows but the plan covers {plan.num_cells} cells")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    if pooling != "mean" or plan.is_identity:
        return features[plan.anchor]
    # Dropped cells form one bag more, which is cut off again. Bags are read row by row and summed in a fixed order:
    # no copy per cell, and the same result every time also on an accelerator.
    bag = torch.where(plan.dropped, plan.num_kept, plan.segment)
    length = torch.zeros(plan.num_kept + 1, dtype=torch.long, device=bag.device)
    length = length.scatter_add_(0, bag, torch.ones_like(bag))
    cells, first = bag.argsort(stable=True), length.cumsum(0) - length

    def means(columns: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.embedding_bag(cells, columns.float(), first, mode="mean")
        return pooled[: plan.num_kept].to(features.dtype)

    if features.dtype == torch.float32:
        return means(features)
    return torch.cat([means(part) for part in features.split(max(CAST_AT_ONCE // len(features), 1), dim=1)], dim=1)


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


def _droppable(
    ids: torch.Tensor,
    run: torch.Tensor,
    length: torch.Tensor,
    start: torch.Tensor,
    config: CompressionConfig,
    meaningless: torch.Tensor,
) -> torch.Tensor:
    """Return (N,) bool over run slots: may the run be dropped?"""
    empty = meaningless[ids[:, : config.top_k]].all(dim=1)
    if config.drop_scope == "first":
        return empty[start]
    return torch.zeros_like(length).scatter_add_(0, run, empty.long()) == length


def _restore_minimum(
    keep: torch.Tensor, dropped: torch.Tensor, block: torch.Tensor, num_blocks: int, min_keep: int
) -> torch.Tensor:
    """Keep the first dropped runs of every block that would otherwise have fewer than `min_keep` tokens."""
    if min_keep == 0:
        return keep
    kept = torch.zeros(num_blocks, dtype=torch.long, device=keep.device).scatter_add_(0, block, keep.long())
    rank = dropped.cumsum(0) - dropped.long()  # dropped runs before this one, over all blocks
    first_rank = torch.full_like(kept, keep.shape[0]).scatter_reduce_(
        0, block, torch.where(dropped, rank, keep.shape[0]), "amin"
    )
    return keep | (dropped & (rank - first_rank[block] < (min_keep - kept)[block]))


def _anchor_offset(
    length: torch.Tensor, start: torch.Tensor, in_block: torch.Tensor, config: CompressionConfig
) -> torch.Tensor:
    """Return (N,) long over run slots: the anchor's offset from the first cell of the run.

    A mean is anchored at the middle cell, whose position is the nearest to the run's centre.
    """
    if config.pooling == "first":
        return torch.zeros_like(length)
    if config.pooling == "mean":
        return (length - 1).clamp(min=0) // 2
    return (_hash32(in_block[start], config.seed) * length) >> 32  # a uniform integer in 0..length-1


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
