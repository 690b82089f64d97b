"""Attention knockout on any supported model: cut chosen edges of the language model's attention, and prove it.

    with knockout(model, [Block(row=0, sources=object_columns, destinations=last_column, layers=(2, 3))]) as report:
        logits = model(**inputs).logits
    report.largest_blocked_weight  # 0.0, measured inside the kernel; anything else raises

The mask of each attention module is altered by a forward pre-hook, in the form in which it arrives, so it works the
same under SDPA and eager attention, padded or not, in a batch, with or without a cache. The weights of the keys that
remain are renormalised by the softmax itself. Nothing global is patched and the hooks go on exit.

Limits. Other kernels (flash, flex) take no mask of edges: the model must be loaded with SDPA or eager attention.
Layers that are no softmax attention (linear attention, convolutions) have no edges to cut; naming one is an error,
`layers=None` means all that can be cut, and `knockout_support` lists the others. In sliding-window layers an edge
beyond the window does not exist anyway; with a cache that has dropped columns the run stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped

from .attention_masks import Block, KnockoutReport, blocked_edges, cut_mask
from .attention_probe import KnockoutError, weights_on_sources

KERNELS = ("sdpa", "eager")
SUM_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
__all__ = ["Block", "KnockoutError", "KnockoutReport", "Support", "knockout", "knockout_support"]


@dataclass(frozen=True)
class Support:
    """What can be cut in a model.

    Attributes:
        kernel: the attention implementation of its language model.
        layers: blocks of the language model.
        cuttable: those with edges that can be cut.
        reasons: why another block cannot be cut.
        sliding: cuttable blocks with a sliding window: edges beyond the window do not exist.
        bidirectional: whether the tokens of an image also read each other forwards, so that a cut can change
            positions before its first destination.
        heads: query heads of a cuttable layer.
        problem: why nothing can be cut at all, "" otherwise.
    """

    kernel: str
    layers: int
    cuttable: tuple[int, ...]
    reasons: dict[int, str]
    sliding: tuple[int, ...]
    bidirectional: bool
    heads: int
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def knockout_support(model: nn.Module) -> Support:
    """Say what of a model can be cut, without running it.

    Args:
        model: a supported model, possibly wrapped by PEFT.
    """
    model = unwrapped(model)
    family = family_of(model)
    blocks, config = family.llm_blocks(model), model.config.get_text_config()
    kernel = str(getattr(config, "_attn_implementation", None) or "eager")
    reasons, cuttable, sliding = {}, [], []
    types = getattr(config, "layer_types", None) or []
    for number, block in enumerate(blocks):
        kind = types[number] if number < len(types) else "full_attention"
        if not isinstance(getattr(block, "self_attn", None), nn.Module):
            reasons[number] = f"{kind}: the block has no softmax attention over columns"
            continue
        cuttable.append(number)
        if "sliding" in kind or "chunked" in kind:
            sliding.append(number)
    problem = ""
    if kernel not in KERNELS:
        problem = f"attn_implementation={kernel!r} takes no mask of edges; load the model with 'sdpa' or 'eager'"
    elif not cuttable:
        problem = "no block of the language model has softmax attention"
    bidirectional = bool(getattr(config, "use_bidirectional_attention", None))
    heads = int(config.num_attention_heads)
    return Support(kernel, len(blocks), tuple(cuttable), reasons, tuple(sliding), bidirectional, heads, problem)


@contextmanager
def knockout(model: nn.Module, blocks: Sequence[Block], verify: bool = True) -> Iterator[KnockoutReport]:
    """Cut edges of attention in every forward pass inside the block.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        blocks: what to cut; columns are those of the padded prompt, rows those of the batch. No block: bit-identical
            to the plain model.
        verify: measure the real weights on the cut edges in the first call (see `attention_probe`), in every layer.

    Yields:
        A report that is filled by the first call.

    Raises:
        ValueError: the kernel takes no mask, or a block names a layer, head, row or column that cannot be cut.
        KnockoutError: a blocked weight is not exactly 0, the weights left do not add up to 1, or a layer that should
            have been cut was never reached.
    """
    model = unwrapped(model)
    support, report = knockout_support(model), KnockoutReport()
    _require(support, blocks)
    surgery = _Surgery(model, list(blocks), support, report, verify)
    handles = surgery.install()
    try:
        yield report
    finally:
        for handle in handles:
            handle.remove()
    surgery.require_all_checked()


def _require(support: Support, blocks: Sequence[Block]) -> None:
    if support.problem and blocks:
        raise ValueError(support.problem)
    for block in blocks:
        for layer in block.layers or ():
            if layer not in support.cuttable:
                reason = support.reasons.get(layer, f"the model has layers 0..{support.layers - 1}")
                raise ValueError(f"layer {layer} cannot be cut: {reason}")
        for head in block.heads or ():
            if not 0 <= head < support.heads:
                raise ValueError(f"a block names head {head}, the model has heads 0..{support.heads - 1}")


class _Surgery:
    """The hooks of one knockout and what they share."""

    def __init__(
        self, model: nn.Module, blocks: list[Block], support: Support, report: KnockoutReport, verify: bool
    ) -> None:
        family = family_of(model)
        self.language_model, self.blocks, self.report = family.language_model(model), blocks, report
        self.verify, self.called = verify, False
        self.layers = {
            layer: family.llm_blocks(model)[layer].self_attn
            for layer in support.cuttable
            if any(block.acts_in(layer) for block in blocks)
        }
        self.heads = support.heads
        self.masks: dict[tuple[Any, ...], tuple[Any, torch.Tensor | None]] = {}

    def install(self) -> list[Any]:
        """Register all hooks."""
        if not self.layers:
            return []
        handles = [self.language_model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer, attention in self.layers.items():
            hook = _LayerHook(self, layer)
            handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def require_all_checked(self) -> None:
        """Fail if a pass ran but a layer that should have been cut was not checked."""
        missed = [layer for layer in self.layers if layer not in self.report.layers]
        if self.verify and self.called and missed:
            raise KnockoutError(f"layers {missed} were to be cut, but no pass ever held an edge to cut there")

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start of a pass: forget masks, and check that blocks name no padding."""
        self.called = True
        self.masks.clear()
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return
        for block in self.blocks:
            columns = torch.cat([block.sources, block.destinations])
            if block.row < len(mask) and len(columns) and int(columns.max()) < mask.shape[1]:
                padded = columns[~mask[block.row].bool().cpu()[columns]]
                if len(padded):
                    raise ValueError(f"a block of row {block.row} names column {int(padded[0])}, which is padding")

    def mask_for(self, layer: int, mask: torch.Tensor | None, hidden: torch.Tensor, first: int) -> torch.Tensor | None:
        """The mask of a layer with its edges cut; None if this call holds none of them. Layers share masks."""
        acting = tuple(number for number, block in enumerate(self.blocks) if block.acts_in(layer))
        key = (id(mask), acting, first, hidden.shape[1])
        if key not in self.masks:
            queries = range(first, first + hidden.shape[1])
            edges = blocked_edges(
                [self.blocks[number] for number in acting], hidden.shape[0], self.heads, queries, queries.stop
            ).to(hidden.device)
            cut = cut_mask(mask, edges, first, hidden.dtype) if bool(edges.any()) else None
            self.masks[key] = (mask, cut)  # the mask is kept, so that its id stays its own
        return self.masks[key][1]


class _LayerHook:
    """Pre-hook of one attention module."""

    def __init__(self, surgery: _Surgery, layer: int) -> None:
        self.surgery, self.layer = surgery, layer

    def __call__(
        self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(args) > 1:
            raise KnockoutError(
                f"{type(attention).__name__} is called with positional masks, which knockout cannot cut"
            )
        cache = kwargs.get("past_key_values")
        first = int(cache.get_seq_length(self.layer)) if cache is not None else 0
        report = self.surgery.report
        cut = self.surgery.mask_for(self.layer, kwargs.get("attention_mask"), hidden, first)
        new = kwargs if cut is None else {**kwargs, "attention_mask": cut}
        if cut is not None and self.surgery.verify and self.layer not in report.layers:
            for group in self._checkable(first, first + hidden.shape[1], int(attention.head_dim) - 1):
                self._verify(attention, args, kwargs, new, group, first)
            report.layers.append(self.layer)
        return None if cut is None else (args, new)

    def _checkable(self, begin: int, end: int, slots: int) -> Iterator[list[Block]]:
        """Parts of the acting blocks that one measurement can take, for the queries of one call."""
        acting = [block for block in self.surgery.blocks if block.acts_in(self.layer)]
        yield from _fitting([part for block in acting for part in _edges_only(block, begin, end)], slots)

    def _verify(
        self,
        attention: Any,
        args: tuple[Any, ...],
        old: dict[str, Any],
        new: dict[str, Any],
        blocks: list[Block],
        first: int,
    ) -> None:
        """Measure the weights on the cut edges, with and without the cut."""
        report = self.surgery.report
        measured, sums = weights_on_sources(attention, args, new, blocks, first)
        for block, weights in zip(blocks, measured, strict=True):
            worst = float(weights.abs().max())
            report.largest_blocked_weight = max(report.largest_blocked_weight, worst)
            if not worst == 0.0:  # also catches NaN
                raise KnockoutError(
                    f"layer {self.layer}, row {block.row}: a destination still reads a blocked source with weight "
                    f"{worst:.3g}; the knockout did not take effect"
                )
            at = (block.destinations - first).to(sums.device)
            error = float((sums[block.row, at].float() - 1).abs().max())
            report.largest_sum_error = max(report.largest_sum_error, error)
        if report.largest_sum_error > SUM_TOLERANCE.get(sums.dtype, 3e-2):
            raise KnockoutError(
                f"layer {self.layer}: the weights that remain are off a sum of 1 by {report.largest_sum_error:.3g}"
            )
        uncut, _ = weights_on_sources(attention, args, old, blocks, first)
        report.add_weight_before(self.layer, torch.cat([weights.float().flatten() for weights in uncut]))


def _edges_only(block: Block, begin: int, end: int) -> list[Block]:
    """Blocks whose sources and destinations are all cut from each other, within the queries of one call.

    A column that is source and destination keeps reading itself (`keep_self`), so it is checked against the others.
    """
    inside = block.destinations[(block.destinations >= begin) & (block.destinations < end)]
    both = inside[torch.isin(inside, block.sources)] if block.keep_self else inside[:0]
    plain = inside[~torch.isin(inside, both)]
    parts = [_part(block, block.sources, plain)] if len(plain) else []
    for column in both:
        others = block.sources[block.sources != column]
        if len(others):
            parts.append(_part(block, others, column[None]))
    return parts


def _part(block: Block, sources: torch.Tensor, destinations: torch.Tensor) -> Block:
    return Block(block.row, sources, destinations, block.layers, block.heads)


def _fitting(blocks: list[Block], slots: int) -> Iterator[list[Block]]:
    """Deal blocks into groups with at most `slots` of one row."""
    groups: list[list[Block]] = []
    seen: dict[int, int] = {}
    for block in blocks:
        turn = seen.get(block.row, 0)
        seen[block.row] = turn + 1
        while len(groups) <= turn // slots:
            groups.append([])
        groups[turn // slots].append(block)
    yield from groups
