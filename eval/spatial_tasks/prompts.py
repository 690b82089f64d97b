"""The words of the questions: the published prompts character by character, and plain ones for the fair protocol.

The published prompts are indented by twelve blanks on every line because of how they were laid out in a source file,
and say "decription". Both are part of what the published figures were measured with, so ``paper_*`` keeps them; the
``fair_*`` prompts say the same without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .items import LETTERS

STYLES = ("qwen", "llava", "internvl")
_INDENT = "\n" + 12 * " "
_BLANK = "\n" + _INDENT


def check_style(style: str) -> str:
    """Return the style, how a family of models is asked and read.

    Raises:
        ValueError: it is unknown.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; accepted are {', '.join(STYLES)}.")
    return style


def paper_choice_prompt(options: Sequence[str], style: str = "qwen") -> str:
    """The published prompt of What's Up, COCO-spatial and GQA-spatial.

    Args:
        options: descriptions in the order shown, 2 to 9.
        style: ``llava`` has an ending of its own.

    Raises:
        ValueError: the style is unknown or the number of options is not supported.
    """
    letters = _letters(options)
    if check_style(style) == "llava":
        ending = "Please select the correct option and return only the letter of the option.\nYour choice is:"
    else:
        ending = f"Please answer with {', '.join(letters[:-1])} or {letters[-1]}.\nYour answer is:"
    head = f"Please choose the best decription for the image from the following {len(options)} options:"
    lines = [head, *(f"{letter}: {option}" for letter, option in zip(letters, options, strict=True)), ending]
    return _INDENT + _BLANK.join(lines) + _INDENT


def paper_statement_prompt(statement: str) -> str:
    """The published prompt of VSR."""
    return (
        f"{_INDENT}Please check if the following description is correct:\n{_BLANK}Description: {statement}\n{_BLANK}"
        f'Please answer with either "True" or "False".{_INDENT}Your answer is:{_INDENT}'
    )


def fair_choice_prompt(options: Sequence[str], question: str = "") -> str:
    """A plain lettered question.

    Args:
        options: in the order shown, 2 to 9.
        question: the first line; by default the options are descriptions to choose from.
    """
    letters = _letters(options)
    lines = [question or "Which description fits the image?"]
    lines += [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return "\n".join([*lines, "Answer with the letter of the option."])


def fair_statement_question(statement: str) -> str:
    """The first line of a lettered question about a statement."""
    return f"Is the following description of the image true or false? {statement}"


def named_options(question: str, options: Sequence[str]) -> list[int]:
    """The options that a question names, each exactly once, in its order; empty unless it names all of them."""
    spans = _spans(question, options)
    found = [index for _, index in spans]
    return found if sorted(found) == list(range(len(options))) else []


def rename_options(question: str, options: Sequence[str], order: Sequence[int]) -> str:
    """Write other options at the places where the question names them.

    Args:
        question: names every option exactly once.
        options: what is named.
        order: index of the option that is to stand at the first, second ... place.

    Raises:
        ValueError: the question does not name every option exactly once.
    """
    if not named_options(question, options):
        raise ValueError(f"question {question!r} does not name each of {list(options)} exactly once.")
    parts, end = [], 0
    for (match, _), new in zip(_spans(question, options), order, strict=True):
        parts += [question[end : match.start()], options[new]]
        end = match.end()
    return "".join([*parts, question[end:]])


def _spans(question: str, options: Sequence[str]) -> list[tuple[re.Match[str], int]]:
    longest_first = sorted(range(len(options)), key=lambda index: -len(options[index]))
    pattern = "|".join(f"(?P<o{index}>{re.escape(options[index])})" for index in longest_first)
    return [(match, int(match.lastgroup[1:])) for match in re.finditer(rf"\b(?:{pattern})\b", question)]  # type: ignore[index]


def _letters(options: Sequence[str]) -> str:
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"options are {list(options)}; a lettered question has 2 to {len(LETTERS)}.")
    return LETTERS[: len(options)]
