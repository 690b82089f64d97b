"""Write a token map as aligned text for a terminal."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .token_map import TokenMap

MERGED = "·"
DROPPED = "×"


def render_text(token_map: TokenMap, max_word: int = 12) -> str:
    """Grid of words, one line per grid row, columns aligned (wide East Asian characters count twice).

    With compression, a run shows its word in its first cell and ``·`` in the others; dropped cells show ``×``.

    Args:
        token_map: the map.
        max_word: longest word in characters of terminal width, at least 2; longer ones end in ``…``.

    Returns:
        The text, without a final newline.

    Raises:
        ValueError: if `max_word` is less than 2.
    """
    if max_word < 2:
        raise ValueError(f"max_word must be at least 2, got {max_word}.")
    words = [_shortened(word, max_word) for word in _marked(token_map)]
    lines, first = [], 0
    for number, (rows, cols) in enumerate(token_map.grids):
        if len(token_map.grids) > 1:
            lines.append(f"[{block_title(token_map, number)}]")
        cells = words[first : first + rows * cols]
        widths = [max((_width(word) for word in cells[col::cols]), default=0) for col in range(cols)]
        for row in range(rows):
            line = cells[row * cols : (row + 1) * cols]
            lines.append(
                "  ".join(word + " " * (widths[col] - _width(word)) for col, word in enumerate(line)).rstrip()
            )
        first += rows * cols
    return "\n".join([*lines, "", summary(token_map, (f" {MERGED}", f" {DROPPED}"))])


def summary(token_map: TokenMap, marks: tuple[str, str] = ("", "")) -> str:
    """One line: how many tokens, and what compression leaves of them.

    Args:
        token_map: the map.
        marks: explained signs, put behind the numbers of merged and of dropped tokens.
    """
    total = len(token_map)
    if token_map.anchor is None:
        return f"{total} visual tokens, {len(token_map.runs)} runs"
    method = (token_map.compression or {}).get("method", "compressed")
    dropped = int((~token_map.keeps).sum())
    merged = total - dropped - token_map.kept
    return (
        f"{total} visual tokens -> {token_map.kept} kept ({method}: {100 * token_map.reduction_rate:.1f} % fewer; "
        f"{merged} merged{marks[0]}, {dropped} dropped{marks[1]})"
    )


def block_title(token_map: TokenMap, number: int) -> str:
    """Name of a feature block: tile 3, thumbnail."""
    geometry = token_map.geometry
    return "thumbnail" if geometry is not None and geometry.blocks[number].thumbnail else f"tile {number + 1}"


def _marked(token_map: TokenMap) -> list[str]:
    """Words of all cells, with the marks of merged and dropped ones."""
    words = np.array(token_map.words, dtype=object)
    if token_map.anchor is not None:
        words[np.diff(token_map.cell_runs, prepend=-1) == 0] = MERGED
        words[~token_map.keeps] = DROPPED
    return words.tolist()


def _shortened(word: str, longest: int) -> str:
    """The word, cut to a terminal width."""
    if _width(word) <= longest:
        return word
    kept = ""
    for letter in word:
        if _width(kept + letter) > longest - 1:
            break
        kept += letter
    return kept + "…"


def _width(word: str) -> int:
    """Columns a word takes on a terminal."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in word
    )
