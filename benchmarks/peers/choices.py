"""Peers that choose or merge at the connector: cells by chance or at equal distances, and merging of alike tokens."""

from __future__ import annotations

import torch

from dualstream.eval.baselines import Rule, planner
from dualstream.modeling import VisualDecoder, compressing

from ..prefill import Prefill, first_token
from .task import Choice, Task, Way, choosing, columns_of


def random_cells(task: Task) -> Way:
    """Cells by chance: the least that any choice costs."""

    def choose() -> Choice:
        output = task.encoded()
        numbers = torch.rand(task.blocks, task.cells, device=task.inputs["input_ids"].device)
        return output, best_cells(numbers, task.keep), None

    return choosing(task, choose)


def strided_cells(task: Task) -> Way:
    """Cells at equal distances in raster order, known before there is a picture."""
    device = task.inputs["input_ids"].device
    cells = (2 * torch.arange(task.keep, device=device) + 1) * task.cells // (2 * task.keep)
    anchor = cells.expand(task.blocks, -1)
    return choosing(task, lambda: (task.encoded(), anchor, None))


def token_matching(task: Task) -> Way:
    """Token merging (ToMe, arXiv 2210.09461) of connector features, batched on the device.

    Departures: ToMe merges inside every block of the vision tower, which also saves work there; here, as in its uses
    for vision-language models without training, whole pictures are merged once, before the language model.
    """

    def choose() -> Choice:
        output = task.encoded()
        return output, *matched(task.blockwise(output.pooler_output), task.keep)

    return choosing(task, choose)


def planned(task: Task, rule: Rule, decoder: VisualDecoder) -> Way:
    """A rule of ``eval.baselines``, through ``compressing`` as it is; it runs in numpy and scipy on the host.

    Args:
        task: the work.
        rule: puts the cells of a block into groups.
        decoder: is not asked; any that fits the model.
    """
    plan = planner(rule, task.keep / task.cells)

    def way() -> Prefill:
        with compressing(task.model, "rle", decoder=decoder, planner=plan):
            return first_token(task.model, task.inputs)

    return way


def best_cells(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return (blocks, keep) long ascending: the cells with the highest of (blocks, n) scores."""
    return scores.topk(keep, dim=-1).indices.sort(-1).values


def matched(features: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge tokens by bipartite soft matching, round by round, until `keep` are left in every block.

    In a round each token at an even place looks for the most alike (cosine) at an odd place, and the best matches are
    merged into means that count every cell once; a round can at most halve the tokens.

    Args:
        features: (blocks, n, d).
        keep: tokens to keep, at least 1.

    Returns:
        anchor: (blocks, keep) long ascending, the cell at which each token stands: that of the odd place it was merged
        into. group: (blocks, n) long, token that every cell counts into.
    """
    blocks, cells, width = features.shape
    anchor = torch.arange(cells, device=features.device).expand(blocks, -1)
    group, sums = anchor, features.float()
    while (left := sums.shape[1]) > keep:
        number = min((left + 1) // 2, left - keep)
        unit = torch.nn.functional.normalize(sums, dim=-1).to(features.dtype)  # the mean has the direction of the sum
        score, partner = (unit[:, 0::2] @ unit[:, 1::2].mT).max(-1)
        merged = score.argsort(dim=-1, descending=True, stable=True)[:, :number]
        source, target = 2 * merged, 2 * partner.gather(1, merged) + 1
        wide = target[..., None].expand(-1, -1, width)
        sums = sums.scatter_add(1, wide, sums.gather(1, source[..., None].expand(-1, -1, width)))
        stays = torch.ones(blocks, left, dtype=torch.bool, device=sums.device).scatter(1, source, False)
        place = (stays.cumsum(1) - 1).scatter(1, source, 0)
        place = place.scatter(1, source, place.gather(1, target))  # where every token of this round went
        order = columns_of(stays, left - number)
        group, anchor = place.gather(1, group), anchor.gather(1, order)
        sums = sums.gather(1, order[..., None].expand(-1, -1, width))
    return anchor, group
