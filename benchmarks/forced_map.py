"""Decoders that do all the work of reading and then say what makes a wanted number of runs.

Random weights read noise, which has no runs; a trained reading has as many as its picture. A forced map lets the whole
product path run untouched, at any reduction rate.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dualstream.eval.decoder_costs import largest_pruned
from dualstream.modeling import VisualDecoder
from dualstream.modeling.families import family_of

DECODERS = ("pruned", "linear", "factored", "unembedding")


def kept_cells(grids: torch.Tensor, reduction: float) -> torch.Tensor:
    """Return (n_blocks,) long: runs of every block at a reduction rate, at least one per row of cells.

    Args:
        grids: (n_blocks, 2) long, height and width of every block.
        reduction: share of visual tokens to remove, 0 to 1.

    Raises:
        ValueError: the rate is not within 0..1.
    """
    if not 0 <= reduction <= 1:
        raise ValueError(f"reduction={reduction} must lie within 0..1")
    cells = grids.prod(-1)
    return ((1 - reduction) * cells).round().long().clamp(min=grids[:, 0], max=cells)


def forced_ids(grids: torch.Tensor, reduction: float) -> torch.Tensor:
    """Return (N,) long readings that make ``kept_cells`` runs in every block, spread evenly over rows.

    A run ends at the end of a row of cells in any case; within a row, readings alternate between two tokens.
    """
    parts = []
    for (height, width), kept in zip(grids.tolist(), kept_cells(grids, reduction).tolist(), strict=True):
        row, column = torch.arange(height)[:, None], torch.arange(width)[None]
        runs = (row + 1) * kept // height - row * kept // height
        parts.append((column * runs // width % 2).flatten())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


class ForcedMap(VisualDecoder):
    """A visual decoder whose readings are replaced after they have been computed."""

    forced: torch.Tensor | None = None

    def top_k(self, features: torch.Tensor, k: int = 1, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Read as ``VisualDecoder.top_k`` does, then return the forced readings, (N, k) long."""
        ids = super().top_k(features, k, *args, **kwargs)
        if self.forced is None:
            return ids
        return torch.where(ids < 0, ids, self.forced[:, None])  # ids are never negative; waits for the reading


def build_decoder(kind: str, model: nn.Module, seed: int = 0) -> VisualDecoder:
    """Make a visual decoder with random weights, in the dtype and on the device of a model.

    Args:
        kind: ``pruned`` (as many classes as cost 1 % of an LLM token, see ``largest_pruned``), ``linear``,
            ``factored``, or ``unembedding``, which shares the model's output matrix.
        model: whose features it reads.
        seed: of the weights.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in DECODERS:
        raise ValueError(f"decoder={kind!r} is unknown; choose one of {', '.join(DECODERS)}")
    unembedding = family_of(model).unembedding(model).weight.detach()
    if kind == "unembedding":
        return VisualDecoder.from_unembedding(unembedding)
    vocab_size, width = unembedding.shape
    classes = largest_pruned(model.config) if kind == "pruned" else None
    decoder = VisualDecoder.blank(vocab_size, width, kind, classes, unembedding)
    if kind == "factored":
        decoder.reset_parameters()
    else:
        decoder.own_parameter.data.copy_(unembedding[: classes or vocab_size])
    if classes is not None:
        token_classes = torch.arange(vocab_size).clamp(max=classes - 1)
        decoder.set_classes(token_classes, torch.arange(classes))
    return decoder.requires_grad_(False)


def forced(decoder: VisualDecoder, grids: torch.Tensor, reduction: float) -> ForcedMap:
    """Return a decoder that shares the weights of another and reads what makes a reduction rate.

    Args:
        decoder: does the work.
        grids: (n_blocks, 2) long, of the batches it will read.
        reduction: see ``kept_cells``.
    """
    changed: Any = copy.copy(decoder)
    changed.__class__ = ForcedMap
    changed.forced = forced_ids(grids, reduction).to(decoder.own_parameter.device)
    return changed
