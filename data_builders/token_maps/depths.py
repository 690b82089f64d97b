"""Where in the model the visual tokens are read, and what to call it."""

from __future__ import annotations

from collections.abc import Iterable

Depth = int | None  # None: the connector output, before the language model; k: after k of its blocks
CONNECTOR, LLM = "connector", "llm"
LAST = "last"


def parse_depths(text: str, num_blocks: int) -> tuple[Depth, ...]:
    """Read a comma-separated list of depths.

    Args:
        text: ``connector``, numbers of language-model blocks run, and ``last`` for all of them.
        num_blocks: blocks of the language model, L.

    Returns:
        Every depth once, the connector first, then ascending.

    Raises:
        ValueError: if a word is none of these, or a number lies outside 0..L.
    """
    return sorted_depths(_parse_depth(word.strip(), text, num_blocks) for word in text.split(","))


def sorted_depths(depths: Iterable[Depth]) -> tuple[Depth, ...]:
    """Every depth once, the connector first, then ascending."""
    return tuple(sorted(set(depths), key=lambda depth: -1 if depth is None else depth))


def stage_of(depth: Depth) -> str:
    """``connector`` or ``llm``."""
    return CONNECTOR if depth is None else LLM


def config_name(depth: Depth) -> str:
    """Name of the corpus's part with this depth, e.g. ``connector`` or ``llm-5``."""
    return CONNECTOR if depth is None else f"{LLM}-{depth}"


def _parse_depth(word: str, text: str, num_blocks: int) -> Depth:
    if word == CONNECTOR:
        return None
    if word == LAST:
        return num_blocks
    if word.isdecimal() and int(word) <= num_blocks:
        return int(word)
    raise ValueError(
        f"depths={text!r}: {word!r} is no depth of this model; accepted are {CONNECTOR}, {LAST} and 0..{num_blocks}, "
        "separated by commas."
    )
