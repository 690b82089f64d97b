"""What to add to two objects' tokens so that they stand in another relation, estimated on other pairs of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dualstream.analysis.object_tokens import generator

from ..items import ROLES
from ..object_sets import touched_tokens
from ..states import CONNECTOR, LLM, Place, read_places
from ..vision_states import chosen_depths

if TYPE_CHECKING:
    from ..bench import Bench
    from ..items import ObjectPair

LEAST_PAIRS = 2  # other pairs behind an estimate


@dataclass(frozen=True)
class PairMeans:
    """Mean states of the two objects of a pair at one place.

    Attributes:
        pair_id: of the pair.
        kinds: what subject and reference are.
        means: (4, 2, d) float32: relation in the order of the source, subject and reference.
    """

    pair_id: str
    kinds: tuple[str, str]
    means: torch.Tensor

    @property
    def vectors(self) -> torch.Tensor:
        """(4, d): subject minus reference, by relation."""
        return self.means[:, 0] - self.means[:, 1]


def sites_of(bench: Bench, most: int = 3) -> list[Place]:
    """The connector's output and some depths of the language model, none of them after its last block.

    Args:
        bench: with the model.
        most: depths of the language model.
    """
    depths = [1 + depth for depth in chosen_depths(bench.llm_depth - 2, most)] if bench.llm_depth > 1 else []
    return [Place(0, CONNECTOR, 0), *(Place(number, LLM, depth) for number, depth in enumerate(depths, 1))]


def pair_means(bench: Bench, pairs: Sequence[ObjectPair], places: Sequence[Place]) -> dict[Place, list[PairMeans]]:
    """Mean states of both objects in the four pictures of every pair, under a prompt that asks nothing.

    Args:
        bench: with the model.
        pairs: of objects.
        places: where on the way.

    Returns:
        Place -> one entry per pair, in the order given.
    """
    items = [item for pair in pairs for item in pair.items]
    found: dict[Place, list[torch.Tensor]] = {place: [] for place in places}
    for part in bench.batches(items):
        states: dict[Place, torch.Tensor] = {}
        sizes = read_places(bench, bench.inputs(part), places, states.__setitem__)
        for place in places:
            for item, own in zip(part, states[place].split(sizes), strict=True):
                tokens = touched_tokens(bench, item)
                found[place].append(torch.stack([own[tokens[role]].mean(0) for role in ROLES]))
    return {
        place: [
            PairMeans(pair.pair_id, pair.kinds, torch.stack(means[4 * number : 4 * number + 4]))
            for number, pair in enumerate(pairs)
        ]
        for place, means in found.items()
    }


def others(means: Sequence[PairMeans], pair_id: str) -> list[PairMeans]:
    """The pairs that share no object with a pair.

    Raises:
        ValueError: there are too few.
    """
    own = next(each for each in means if each.pair_id == pair_id)
    rest = [each for each in means if each.pair_id != pair_id and not set(each.kinds) & set(own.kinds)]
    if len(rest) < LEAST_PAIRS:
        raise ValueError(
            f"only {len(rest)} pairs share no object with {pair_id!r}; a direction needs {LEAST_PAIRS}. Raise --limit."
        )
    return rest


def direction(rest: Sequence[PairMeans], target: int, origin: int) -> torch.Tensor:
    """Mean over pairs of the relation vector of ``target`` minus that of ``origin`` (indices of relations), (d,)."""
    return torch.stack([each.vectors[target] - each.vectors[origin] for each in rest]).mean(0)


def control_directions(
    rest: Sequence[PairMeans], target: int, origin: int, seed: int, name: str
) -> Mapping[str, torch.Tensor]:
    """Vectors of the direction's length that should not turn the answer.

    Args:
        rest: pairs to estimate on.
        target: relation to turn to.
        origin: relation of the picture.
        seed: of the draws.
        name: of the pair, so that pairs draw independently.

    Returns:
        ``random``; ``same_relation``: difference of two estimates of the picture's own relation, from halves of the
        pairs; ``other_axis``: the direction between the two relations of the other axis.
    """
    wanted = direction(rest, target, origin)
    rng = generator(seed, name, "control")
    order = rng.permutation(len(rest))
    halves = [
        torch.stack([rest[number].vectors[origin] for number in part]).mean(0) for part in np.array_split(order, 2)
    ]
    across = (2, 3) if origin < 2 else (0, 1)
    if rng.integers(2):
        across = across[::-1]
    found = {
        "random": torch.from_numpy(rng.standard_normal(len(wanted))).to(wanted),
        "same_relation": halves[0] - halves[1],
        "other_axis": direction(rest, *across),
    }
    return {kind: vector * (wanted.norm() / vector.norm().clamp(min=1e-12)) for kind, vector in found.items()}
