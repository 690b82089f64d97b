"""Ways to spend a number of visual tokens that do not read the picture: what a compression has to beat.

Each is a rule that puts the cells of one feature block (an image or a tile) into groups; a group becomes one token,
the mean of its cells, and a dropped cell belongs to no group. Rules are pure functions of arrays; ``planner`` makes
them what ``compressing`` takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from dualstream.modeling import RunLengthPlan

if TYPE_CHECKING:
    from dualstream.modeling import EncodedImages, Planner

DROPPED = -1
# (features (n, d) float32, height, width, tokens to keep, random numbers) -> (n,) group of every cell
Rule = Callable[[np.ndarray, int, int, int, np.random.Generator], np.ndarray]


def random_cells(features: np.ndarray, height: int, width: int, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Keep cells at random and drop the others."""
    return _only(rng.choice(height * width, size=keep, replace=False), height * width)


def strided_cells(features: np.ndarray, height: int, width: int, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Keep cells at equal distances in raster order and drop the others."""
    cells = height * width
    return _only((2 * np.arange(keep) + 1) * cells // (2 * keep), cells)


def merged_neighbours(
    features: np.ndarray, height: int, width: int, keep: int, rng: np.random.Generator
) -> np.ndarray:
    """Merge the two adjacent regions that touch in the most alike pair of cells, until `keep` regions are left.

    Alike is the cosine of the two cells; adjacent is left, right, above, below. That is Kruskal's algorithm, so the
    regions are what a minimum spanning tree of the grid leaves when its worst edges are cut.
    """
    cell = np.arange(height * width).reshape(height, width)
    one = np.concatenate([cell[:, :-1].ravel(), cell[:-1].ravel()])
    other = np.concatenate([cell[:, 1:].ravel(), cell[1:].ravel()])
    unit = _unit(features)
    distance = 2 - (unit[one] * unit[other]).sum(1)  # 1 to 3: scipy takes a weight of 0 for no edge
    tree = minimum_spanning_tree(coo_array((distance, (one, other)), shape=(cell.size, cell.size))).tocoo()
    best = np.argsort(tree.data, kind="stable")[: cell.size - keep]
    edges = coo_array((np.ones(len(best)), (tree.row[best], tree.col[best])), shape=(cell.size, cell.size))
    return connected_components(edges, directed=False)[1]


def matched_tokens(features: np.ndarray, height: int, width: int, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Merge by bipartite soft matching of whole pictures, as token merging (ToMe, arXiv 2210.09461) does in a block.

    In every round each other token looks for the most alike (cosine) of the rest, and the best matches are merged
    into means that count every cell once; a round can at most halve the tokens.
    """
    group = np.arange(height * width)
    sums, sizes = features.astype(np.float64), np.ones((len(group), 1))
    while len(sums) > keep:
        unit = _unit(sums / sizes)
        alike = unit[0::2] @ unit[1::2].T
        partner, score = alike.argmax(1), alike.max(1)
        merged = np.argsort(-score, kind="stable")[: len(sums) - keep]
        target = np.arange(len(sums))
        target[2 * merged] = 2 * partner[merged] + 1
        np.add.at(sums, target[2 * merged], sums[2 * merged])
        np.add.at(sizes, target[2 * merged], sizes[2 * merged])
        stays = np.flatnonzero(target == np.arange(len(sums)))
        group = np.searchsorted(stays, target[group])
        sums, sizes = sums[stays], sizes[stays]
    return group


def pooled_windows(size: int) -> Rule:
    """Rule that averages windows of `size` x `size` cells, smaller ones at the right and lower edge."""

    def rule(features: np.ndarray, height: int, width: int, keep: int, rng: np.random.Generator) -> np.ndarray:
        row, column = np.divmod(np.arange(height * width), width)
        return (row // size) * -(-width // size) + column // size

    return rule


RULES: dict[str, Rule] = {
    "random": random_cells,
    "stride": strided_cells,
    "neighbours": merged_neighbours,
    "tome": matched_tokens,
}


def planner(rule: Rule, ratio: float | None, seed: int = 0, budget: bool = True) -> Planner:
    """Make a rule what ``compressing(planner=...)`` takes.

    Args:
        rule: how the cells of a block are grouped.
        ratio: share of cells to keep, at least one; None keeps as many of every block as the method of the call would.
        seed: of random rules; their choice depends on seed and picture, not on what else is in the batch.
        budget: False for a rule that has a number of tokens of its own.
    """

    @torch.no_grad()
    def plan(images: EncodedImages) -> RunLengthPlan:
        sizes = images.grids.prod(-1).tolist()
        if not budget or ratio is not None:
            keep = [max(1, int((ratio or 1) * size + 0.5)) for size in sizes]
        else:
            keep = images.run_lengths(images.readings()).kept_per_block.tolist()
        blocks = images.features.float().cpu().numpy()
        groups, start = [], 0
        for (height, width), number, pixels in zip(images.grids.tolist(), keep, _pixels(images, sizes), strict=True):
            rng = np.random.default_rng([seed, zlib.crc32(pixels)])
            end = start + height * width
            groups.append(rule(blocks[start:end], height, width, number, rng))
            start = end
        return grouped_plan(groups, images.grids.tolist(), images.features.device)

    return plan


def own_map_planner(depth: int | None = None) -> Planner:
    """Plan from what the language model itself reads after some of its blocks: the answer key of a visual decoder.

    The prompt runs through these blocks once more, so it saves nothing; it is the ceiling of reading *before* them.

    Args:
        depth: blocks executed; None takes those that the visual decoder was taught from, else three quarters.
    """
    from dualstream.modeling.families import family_of
    from dualstream.modeling.lens import encoded_image_states
    from dualstream.modeling.vocabulary_scores import top_k_tokens

    @torch.no_grad()
    def plan(images: EncodedImages) -> RunLengthPlan:
        family, facts = family_of(images.model), images.decoder.training_facts
        head = family.unembedding(images.model)
        blocks = depth if depth is not None else facts.get("teacher_depth")
        if blocks is None:
            blocks = round(0.75 * len(family.llm_blocks(images.model)))
        states = encoded_image_states(images.model, images.inputs, images.output, blocks)
        if facts.get("final_norm", True):
            states = family.final_norm(images.model)(states)
        return images.run_lengths(top_k_tokens(states, head.weight, images.config.top_k, bias=head.bias)[0])

    return plan


def grouped_plan(
    groups: list[np.ndarray], grids: list[list[int]], device: torch.device | str = "cpu"
) -> RunLengthPlan:
    """Turn the groups of every block into a plan; a group stands at its cell that is nearest to its centre.

    Args:
        groups: one (n,) integer array per block: equal numbers stay together, ``DROPPED`` is dropped.
        grids: height and width of every block.
        device: where the plan's tensors go.
    """
    anchors, segments, runs, kept = [], [], [], []
    first_cell = first_kept = first_run = 0
    for group, (_, width) in zip(groups, grids, strict=True):
        stays = np.flatnonzero(group != DROPPED)
        _, label = np.unique(group[stays], return_inverse=True)
        anchor = _central_cells(stays, label, width)
        order = np.argsort(anchor)
        segment = np.full(len(group), DROPPED)
        segment[stays] = np.argsort(order)[label] + first_kept
        run = np.where(segment == DROPPED, len(group) + first_kept + np.arange(len(group)), segment)
        _, first, number = np.unique(run, return_index=True, return_inverse=True)
        anchors.append(anchor[order] + first_cell)
        segments.append(segment)
        runs.append(np.argsort(np.argsort(first))[number] + first_run)  # numbered as they appear
        kept.append(len(order))
        first_cell, first_kept, first_run = first_cell + len(group), first_kept + len(order), first_run + len(first)

    def tensor(parts: list[Any]) -> torch.Tensor:
        return torch.as_tensor(np.concatenate([np.zeros(0, dtype=np.int64), *parts]), dtype=torch.long, device=device)

    return RunLengthPlan(tensor(segments), tensor(anchors), tensor([kept]), tensor(runs))


def _central_cells(cells: np.ndarray, label: np.ndarray, width: int) -> np.ndarray:
    """For every label the one of its cells that is nearest to the mean of their places, the first if several are."""
    place = np.stack(np.divmod(cells, width), axis=1)
    count = np.bincount(label)[:, None]
    centre = np.stack([np.bincount(label, axis) for axis in place.T], axis=1) / count
    distance = ((place - centre[label]) ** 2).sum(1).round(9)
    order = np.lexsort((cells, distance, label))
    return cells[order][np.unique(label[order], return_index=True)[1]]


def _only(kept: np.ndarray, cells: int) -> np.ndarray:
    """Every cell of `kept` is a group of its own, all others are dropped."""
    group = np.full(cells, DROPPED)
    group[kept] = kept
    return group


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _pixels(images: EncodedImages, sizes: list[int]) -> list[bytes]:
    """The pixels of every block, which are rows of ``pixel_values``: one, or as many to a cell in all blocks."""
    pixels = images.inputs["pixel_values"]
    per_cell = len(pixels) // sum(sizes) if len(pixels) != len(sizes) else 0
    rows = [size * per_cell if per_cell else 1 for size in sizes]
    return [part.float().cpu().numpy().tobytes() for part in pixels.split(rows)]
