"""States of the visual tokens on their way: inside the tower, behind the connector, inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling.lens_depths import visit_depths

from .vision_states import chosen_depths, feature_depth, patch_layout, watched_vision

if TYPE_CHECKING:
    from .bench import Bench

VISION, CONNECTOR, LLM = "vision", "connector", "llm"
STAGES = (VISION, CONNECTOR, LLM)
MOST_DEPTHS = 13  # of a stage; a deep tower is looked at in evenly spaced depths


@dataclass(frozen=True, order=True)
class Place:
    """A point on the way.

    Attributes:
        number: position on the way, from 0.
        stage: ``vision``, ``connector`` or ``llm``.
        depth: blocks executed in the stage; 0 for the connector's output.
    """

    number: int
    stage: str
    depth: int

    @property
    def label(self) -> str:
        """For axes of figures: V0..VJ, C, L1..LK."""
        return "C" if self.stage == CONNECTOR else f"{self.stage[0].upper()}{self.depth}"


def all_places(bench: Bench, most: int = MOST_DEPTHS) -> list[Place]:
    """Tower depths up to the one the connector reads, the connector, language-model depths from 1 on.

    Args:
        bench: with the model.
        most: depths per stage.
    """
    found = [(VISION, depth) for depth in chosen_depths(feature_depth(bench.model), most)]
    found.append((CONNECTOR, 0))
    found += [(LLM, depth) for depth in chosen_depths(bench.llm_depth, most) if depth > 0]
    return [Place(number, stage, depth) for number, (stage, depth) in enumerate(found)]


def read_places(
    bench: Bench, inputs: Any, places: Sequence[Place], visit: Callable[[Place, torch.Tensor], None]
) -> list[int]:
    """Hand over the visual tokens' states at several places, in one pass.

    A state of the tower is the mean over the patches that the connector makes a token of. States of the language
    model are those of the residual stream, before any norm.

    Args:
        bench: with the model.
        inputs: what the processor returned, one image per prompt.
        places: where, in any order.
        visit: called as ``visit(place, states)`` with (N, d) float32 on the CPU, images after one another.

    Returns:
        Tokens of every image.
    """
    layout = patch_layout(bench.model, inputs)
    by_vision = {place.depth: place for place in places if place.stage == VISION}
    by_llm = {place.depth: place for place in places if place.stage == LLM}
    connector = next((place for place in places if place.stage == CONNECTOR), None)

    def in_tower(depth: int, states: torch.Tensor) -> None:
        tokens = layout.per_token(layout.raster(states.float()))
        visit(by_vision[depth], tokens.cpu())

    def behind(depth: int | None, states: torch.Tensor) -> None:
        place = connector if depth is None else by_llm[depth]
        if place is not None:
            visit(place, states.float().cpu())

    with torch.no_grad(), watched_vision(bench.model, list(by_vision), in_tower):
        grids, image_index = visit_depths(bench.model, inputs, [None, *by_llm], behind, final_norm=False)
    return (
        torch.zeros(int(image_index.max()) + 1, dtype=torch.long).index_add_(0, image_index, grids.prod(-1)).tolist()
    )


def read_pictures(
    bench: Bench, images: Sequence[Any], prompt: str, places: Sequence[Place]
) -> list[dict[Place, torch.Tensor]]:
    """States of every picture of one batch.

    Args:
        bench: with model and processor.
        images: RGB pictures.
        prompt: asked of each.
        places: where to read.

    Returns:
        Per picture: place -> (n, d) float32 states of its tokens in feature order.
    """
    from dualstream.processing import build_inputs

    inputs = build_inputs(bench.processor, list(images), [prompt] * len(images))
    inputs.pop("compression", None)
    found: dict[Place, torch.Tensor] = {}
    sizes = read_places(bench, inputs.to(bench.model.device), places, found.__setitem__)
    split = {place: states.split(sizes) for place, states in found.items()}
    return [{place: parts[number] for place, parts in split.items()} for number in range(len(images))]
