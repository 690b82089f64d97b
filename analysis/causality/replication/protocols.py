"""What two protocols decide differently: as the public code of arXiv 2410.07149 does it, and mended.

A protocol decides which object, which tokens, which words, which windows and who is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.analysis.annotated_images import AnnotatedObject
from dualstream.analysis.object_tokens import generator, object_tokens, random_tokens, translated_control, with_rings
from dualstream.processing import token_geometry

from ..ablations.ablation import Picture
from ..ablations.selection import Condition
from ..settings import Outcome, Query, query_of, right_token
from ..targets import Target
from . import neo2024

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Options:
    """What decides the rows.

    Attributes:
        random_counts: sizes of random and attributed sets.
        draws: random and moved sets per size in the mended protocol; the public code draws once.
        ig_steps: points of integrated gradients.
        max_new_tokens: longest description.
        area: bounds of the object in square pixels, excluded.
        seed: of all draws.
    """

    random_counts: tuple[int, ...] = (5, 10, 20, 40)
    draws: int = 2
    ig_steps: int = 8
    max_new_tokens: int = 64
    area: tuple[float, float] = neo2024.AREA
    seed: int = 0


class Corrected:
    """Exact geometry, whole-word scorers, the right target of the attribution, several draws, matched controls."""

    name = "corrected"
    deepstack = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def object_of(self, objects: Sequence[AnnotatedObject]) -> AnnotatedObject | None:
        """The public code's rule, crowd regions left out."""
        return neo2024.chosen_object([item for item in objects if not item.is_crowd], self.options.area)

    def tokens(self, item: AnnotatedObject, picture: Image, processor: ProcessorMixin) -> np.ndarray:
        """Tokens that the object touches."""
        return object_tokens(token_geometry(processor, picture.size), item.mask, item.box)

    def query(self, target: Target, setting: str) -> Query:
        """See ``settings.query_of``."""
        length = self.options.max_new_tokens if setting == "generative" else None
        return query_of(target, setting, max_new_tokens=length)

    def right(self, query: Query, outcome: Outcome, tokenizer: Any) -> bool:
        """See ``Query.judge``."""
        return query.judge(outcome.text) is True

    def attributed_token(self, processor: ProcessorMixin, query: Query) -> int:
        """First token of the right answer."""
        return right_token(processor, query)

    def hidden(self, picture: Image, tokens: np.ndarray, processor: ProcessorMixin, name: str) -> Image:
        """The picture with noise in the rectangles of the tokens."""
        from PIL import Image as Pictures

        pixels, rng = np.array(picture.convert("RGB")), generator(self.options.seed, name, "noise")
        for x1, y1, x2, y2 in token_geometry(processor, picture.size).boxes[tokens]:
            part = pixels[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
            part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
        return Pictures.fromarray(pixels)

    def controls(self, picture: Picture) -> list[Condition]:
        """Moved copies of the object and of the object with one ring."""
        found = []
        for ring in (0, 1):
            chosen, suffix = with_rings(picture.geometry, picture.tokens, ring), f"+{ring}" if ring else ""
            name = f"{picture.target.image.name}{suffix}"
            copies = translated_control(
                picture.geometry, chosen, picture.tokens, self.options.seed, name, self.options.draws
            )
            found += [Condition(f"moved{suffix}", draw, copy) for draw, copy in enumerate(copies)]
        return found

    def random_sets(self, count: int, total: int, name: str) -> list[np.ndarray]:
        """Several draws, nested in size."""
        return random_tokens(total, count, self.options.seed, name, self.options.draws)

    def windows(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Windows of equal width that cover all layers."""
        return neo2024.even_windows(layers)

    def last_states(self, states: torch.Tensor, norm: Any) -> torch.Tensor:
        """States after the last block, normed once."""
        return states


class Compatible(Corrected):
    """The public code's choices, see ``neo2024``; random draws are seeded."""

    name = "compatible"
    deepstack = False  # only what enters the language model at its input is replaced

    def object_of(self, objects: Sequence[AnnotatedObject]) -> AnnotatedObject | None:
        """Crowd regions count."""
        return neo2024.chosen_object(objects, self.options.area)

    def tokens(self, item: AnnotatedObject, picture: Image, processor: ProcessorMixin) -> np.ndarray:
        """Cells of floor(short side / grid) pixels (D1)."""
        side = neo2024.grid_side(token_geometry(processor, picture.size))
        return neo2024.cells_of_object(item, picture.size, side)

    def query(self, target: Target, setting: str) -> Query:
        """See ``neo2024.query``."""
        return neo2024.query(target, setting, self.options.max_new_tokens if setting == "generative" else None)

    def right(self, query: Query, outcome: Outcome, tokenizer: Any) -> bool:
        """Substrings and prefixes (D4, D5)."""
        pieces = tokenizer if query.setting == "vqa" else None
        return neo2024.judge(query.setting, query.words.name, outcome.text, pieces)

    def attributed_token(self, processor: ProcessorMixin, query: Query) -> int:
        """First id of "Yes" with special tokens, whatever is asked (D2)."""
        return neo2024.yes_id(processor.tokenizer)

    def hidden(self, picture: Image, tokens: np.ndarray, processor: ProcessorMixin, name: str) -> Image:
        """The cropped square with one tile of noise over every cell."""
        side = neo2024.grid_side(token_geometry(processor, picture.size))
        return neo2024.noise_picture(picture, tokens, side, generator(self.options.seed, name, "noise"))

    def controls(self, picture: Picture) -> list[Condition]:
        """None."""
        return []

    def random_sets(self, count: int, total: int, name: str) -> list[np.ndarray]:
        """One fresh draw per size, not nested (D12)."""
        return random_tokens(total, count, self.options.seed, f"{name} {count}", 1)

    def windows(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Unequal windows (D13)."""
        return neo2024.windows(layers)

    def last_states(self, states: torch.Tensor, norm: Any) -> torch.Tensor:
        """The last entry, which is normed already, normed again (D7)."""
        return norm(states)


PROTOCOLS: dict[str, type[Corrected]] = {"compatible": Compatible, "corrected": Corrected}
