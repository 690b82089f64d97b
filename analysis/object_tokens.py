"""Which visual tokens belong to an object, and the sets it is compared with: rings, controls, random draws.

Every function takes a `TokenGeometry` (`processing.token_geometry(processor, image.size)`) and gives ascending int64
indices into the visual tokens of one image, in the order of the model's features. Indices are positions among the
image's visual tokens, not columns of the prompt.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from dualstream.processing.token_boxes import TokenGeometry


def object_tokens(
    geometry: TokenGeometry,
    mask: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    min_coverage: float = 0.0,
    thumbnail: bool = True,
) -> np.ndarray:
    """Tokens whose rectangle an object covers.

    Args:
        geometry: of the image.
        mask: (height, width) bool over the original image; preferred where there is one.
        box: x1, y1, x2, y2 in pixels of the original image, used where there is no mask.
        min_coverage: share of a token's rectangle that must be covered; 0 takes any overlap of positive area.
        thumbnail: whether tokens of a thumbnail (InternVL) count too.

    Returns:
        (n,) int64 token indices, ascending; empty if the processor cropped the object away.

    Raises:
        ValueError: if neither a mask nor a box is given, or one does not fit the image.
    """
    if mask is not None:
        return geometry.tokens_of_mask(mask, min_coverage, thumbnail)
    if box is not None:
        return geometry.tokens_of_box(box, min_coverage, thumbnail)
    raise ValueError("object_tokens needs a mask or a box, both are None.")


def grid_places(geometry: TokenGeometry) -> np.ndarray:
    """Place of every token on the picture as a whole, tiles joined to one grid.

    Returns:
        (N, 3) int64: 1 for a thumbnail and 0 otherwise, row, column.
    """
    places = geometry.places.copy()
    for number, block in enumerate(geometry.blocks):
        own = places[:, 0] == number
        if not block.thumbnail and len(geometry.blocks) > 1:
            places[own, 1] += round(block.top / block.cell_height)
            places[own, 2] += round(block.left / block.cell_width)
    places[:, 0] = geometry.is_thumbnail
    return places


def with_rings(geometry: TokenGeometry, tokens: np.ndarray, rings: int) -> np.ndarray:
    """A set of tokens and all within `rings` steps of it, diagonal steps included (a Chebyshev ball).

    Rings cross the borders between tiles, stop at the picture's border, and stay inside a thumbnail.

    Args:
        geometry: of the image.
        tokens: (n,) token indices.
        rings: steps, 0 or more.

    Raises:
        ValueError: if `rings` is negative or a token does not exist.
    """
    tokens = _checked(geometry, tokens)
    if rings < 0:
        raise ValueError(f"rings must be 0 or more, got {rings}.")
    if not len(tokens):
        return tokens
    places = grid_places(geometry)
    chosen = places[tokens]
    distance = np.abs(places[:, None, 1:] - chosen[None, :, 1:]).max(-1)
    near = (distance <= rings) & (places[:, None, 0] == chosen[None, :, 0])
    return np.flatnonzero(near.any(1))


def outside_tokens(geometry: TokenGeometry, tokens: np.ndarray) -> np.ndarray:
    """All other tokens of the image, without those that see only padding."""
    outside = geometry.areas > 0
    outside[_checked(geometry, tokens)] = False
    return np.flatnonzero(outside)


def last_row(geometry: TokenGeometry) -> np.ndarray:
    """The last row of tokens in the order of the prompt: of the last block where there are several."""
    places = geometry.places
    block = len(geometry.blocks) - 1
    return np.flatnonzero((places[:, 0] == block) & (places[:, 1] == geometry.blocks[block].rows - 1))


def translations(geometry: TokenGeometry, tokens: np.ndarray, avoid: np.ndarray | None = None) -> list[np.ndarray]:
    """All copies of a token set moved elsewhere: same size, same shape, inside the picture, off the avoided tokens.

    The copy in a thumbnail follows the copy in the tiles, as near as its coarser grid allows.

    Args:
        geometry: of the image.
        tokens: (n,) token indices.
        avoid: tokens that a copy must not touch; default, `tokens` themselves.

    Returns:
        One ascending index array per shift (down, right), in the order of shifts; empty if the set fits nowhere.
    """
    tokens = _checked(geometry, tokens)
    places, forbidden = grid_places(geometry), set(_checked(geometry, tokens if avoid is None else avoid).tolist())
    areas = geometry.areas
    index = {tuple(place): number for number, place in enumerate(places.tolist()) if areas[number] > 0}
    layers = [tokens[places[tokens, 0] == layer] for layer in (0, 1)]
    moved = [_moved(places, layer, index, forbidden) if len(layer) else {} for layer in layers]
    if not len(layers[1]):
        return [copy for _, copy in sorted(moved[0].items())]
    if not len(layers[0]):
        return [copy for _, copy in sorted(moved[1].items())]
    ratio = _extent(places, 1) / _extent(places, 0)
    copies = []
    for shift, copy in sorted(moved[0].items()):
        near = [(np.abs(np.array(shift) * ratio - other).max(), other) for other in moved[1]]
        if near and min(near)[0] <= 1:
            copies.append(np.sort(np.concatenate([copy, moved[1][min(near)[1]]])))
    return copies


def translated_control(
    geometry: TokenGeometry,
    tokens: np.ndarray,
    avoid: np.ndarray | None = None,
    seed: int = 0,
    name: str = "",
    draws: int = 1,
) -> list[np.ndarray]:
    """Size- and shape-matched controls: different translated copies of a token set, drawn at random.

    Args:
        geometry: of the image.
        tokens: (n,) token indices.
        avoid: tokens that a copy must not touch; default, `tokens` themselves.
        seed: of the draw.
        name: of the image, so that images of one run draw independently.
        draws: copies wanted; fewer come back where fewer exist.

    Returns:
        Up to `draws` ascending index arrays, none where the set fits nowhere else.
    """
    copies = translations(geometry, tokens, avoid)
    chosen = generator(seed, name, "translated").permutation(len(copies))[:draws]
    return [copies[number] for number in chosen]


def random_tokens(
    candidates: np.ndarray | int, count: int, seed: int = 0, name: str = "", draws: int = 1
) -> list[np.ndarray]:
    """Distinct tokens drawn uniformly, several times.

    Within a draw the sets of growing `count` contain each other, so that a dose curve is not blurred by fresh draws.

    Args:
        candidates: the tokens to draw from, or their number N for 0..N-1.
        count: tokens per draw; all candidates where there are fewer.
        seed: of the draws.
        name: of the image, so that images of one run draw independently.
        draws: number of draws.

    Returns:
        `draws` ascending index arrays.
    """
    pool = np.arange(candidates) if isinstance(candidates, int) else np.asarray(candidates, dtype=np.int64)
    return [np.sort(generator(seed, name, f"random {draw}").permutation(pool)[:count]) for draw in range(draws)]


def generator(seed: int, *names: str) -> np.random.Generator:
    """A random generator of its own for every combination of seed and names, equal on every machine."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def _moved(
    places: np.ndarray, tokens: np.ndarray, index: dict[tuple[int, ...], int], forbidden: set[int]
) -> dict[tuple[int, int], np.ndarray]:
    """Admissible copies of one layer's tokens by shift (down, right)."""
    own = places[tokens]
    layer = int(own[0, 0])
    height, width = _extent(places, layer)
    copies = {}
    for down in range(-int(own[:, 1].min()), int(height - own[:, 1].max())):
        for right in range(-int(own[:, 2].min()), int(width - own[:, 2].max())):
            found = [index.get((layer, row + down, column + right), -1) for _, row, column in own.tolist()]
            if (down or right) and min(found) >= 0 and forbidden.isdisjoint(found):
                copies[(down, right)] = np.sort(np.array(found, dtype=np.int64))
    return copies


def _extent(places: np.ndarray, layer: int) -> np.ndarray:
    """(rows, columns) of the tiles' common grid (layer 0) or the thumbnail's (1)."""
    return places[places[:, 0] == layer, 1:].max(0) + 1


def _checked(geometry: TokenGeometry, tokens: np.ndarray) -> np.ndarray:
    """Ascending distinct int64 indices of tokens that exist."""
    tokens = np.unique(np.asarray(tokens, dtype=np.int64))
    if len(tokens) and not 0 <= tokens[0] <= tokens[-1] < len(geometry):
        raise ValueError(f"tokens must lie in 0..{len(geometry) - 1}, got {tokens[0]}..{tokens[-1]}.")
    return tokens
