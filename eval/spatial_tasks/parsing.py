"""From what a model wrote to an answer, or to None where it cannot be told: nothing is ever guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dualstream.eval.scene_questions import normalize

from .items import LETTERS
from .prompts import check_style

_NEGATED = re.compile(r"\b(?:not|no|never|neither|isn't|aren't|cannot|can't)\b", re.IGNORECASE)
_LETTER = re.compile(
    r"""^\s*(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|choice|option)?\s*(?:is|:)?\s*
        [(\["'*]*(?P<letter>[A-Za-z])[)\]"'*]*\s*(?P<rest>[.:,)\s].*)?$""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


def paper_letter(text: str, n: int, style: str = "qwen") -> int | None:
    """The published reading of a lettered answer.

    ``qwen`` accepts the bare letter alone. ``llava`` and ``internvl`` also accept a letter that is followed by a
    colon or by nothing but blanks. All else, ``A.`` and ``(A)`` included, is no answer.

    Args:
        text: what the model wrote.
        n: number of options.
        style: family of models.

    Returns:
        Index of the option, or None.
    """
    letters = LETTERS[:n]
    lenient = check_style(style) != "qwen" and (text[1:2] == ":" or not text[1:].strip(" "))
    if len(text) == 1 or (lenient and text):
        return letters.index(text[0]) if text[0] in letters else None
    return None


def paper_truth(text: str) -> bool | None:
    """The published reading of VSR: contains ``True``, else contains ``False``, else no answer."""
    if "True" in text:
        return True
    return False if "False" in text else None


def letter(text: str, n: int) -> int | None:
    """A lettered answer in any usual dress: ``A``, ``a``, ``A.``, ``(A)``, ``A: ...``, ``Answer: A``, ``**A**``.

    A bare "A" followed by words is read as a letter only behind punctuation: "A cat" starts with an article.

    Returns:
        Index of the option, or None: several letters, other text, a letter past the last option, nothing.
    """
    match = _LETTER.match(text)
    if not match:
        return None
    rest = match["rest"] or ""
    if rest.strip() and rest[0] in " \t":
        return None  # "A cat ..." and "I think"
    others = re.findall(rf"(?<![A-Za-z])[{LETTERS[:n]}](?![A-Za-z'])", rest)
    if any(other != match["letter"].upper() for other in others) and re.search(r"\bor\b|\band\b|^\s*,", rest):
        return None  # "A, B", "A. or B"
    index = LETTERS.find(match["letter"].upper())
    return index if 0 <= index < n else None


def phrase(text: str, options: Sequence[str]) -> int | None:
    """The one option that a free answer states, by whole words and without a negation.

    "not left" states nothing, "located" does not contain "cat", and "left or right" is no answer. An option that lies
    inside another one ("left" in "top left") is not counted where only the longer one is meant.

    Returns:
        Index of the option, or None.
    """
    if _NEGATED.search(text):
        plain = normalize(text)  # "no" may be an option itself
        exact = [index for index, option in enumerate(options) if normalize(option) == plain]
        return exact[0] if len(exact) == 1 else None
    found = set()
    rest = f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
    for index in sorted(range(len(options)), key=lambda i: -len(options[i])):
        words = " ".join(re.findall(r"[a-z0-9]+", options[index].lower()))
        if words and f" {words} " in rest:
            found.add(index)
            rest = rest.replace(f" {words} ", "  ")
    return found.pop() if len(found) == 1 else None


def exact(text: str, options: Sequence[str]) -> int | None:
    """The option that equals the answer up to case, outer punctuation and an article, or None."""
    plain = normalize(text)
    return next((index for index, option in enumerate(options) if normalize(option) == plain), None)


def official_yes_no(text: str) -> bool:
    """The official reading of POPE: the first sentence has "no" or "not" among its words, else the answer is yes."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return not {"no", "not"} & set(words)


def yes_no(text: str) -> bool | None:
    """A yes/no answer: the first sentence says yes or no as a whole word and not both; else None."""
    words = set(re.findall(r"[a-z']+", re.split(r"[.\n]", text.strip().lower(), maxsplit=1)[0]))
    yes, no = "yes" in words, bool({"no", "not"} & words)
    return None if yes == no else yes
