"""Judge what a model wrote: does it name a class, does it say yes, does it give the answer asked for.

The public code of arXiv 2410.07149 looks for substrings ("cat" in "located") and takes an empty prediction as the
start of any class; `neo2024` keeps those rules for comparison. Here words are whole words, in either number and any
case, synonyms count if they are given, and a mention under a negation is no mention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from dualstream.eval.hallucination import singulars
from dualstream.eval.spatial_tasks.parsing import yes_no

_WORDS = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CLAUSE = re.compile(r"[.!?;:\n]|\bbut\b|\bhowever\b|\balthough\b|\bwhile\b")
# What denies the mentions behind it, up to the end of the clause.
_DENIALS = frozenset(
    ("no", "not", "never", "none", "neither", "nor", "without", "cannot", "lacks", "lacking", "absent")
)
_CONTRACTED = "n't"
# "not only a cat but a dog" denies nothing.
_NO_DENIAL = (("not", "only"), ("not", "just"), ("no", "doubt"))
# With one of these, what follows a comma is a statement of its own and no further member of a denied list.
_STATES = frozenset(("is", "are", "was", "were", "has", "have", "it's", "there's", "shows", "show", "see", "sits"))


@dataclass(frozen=True)
class ClassWords:
    """The words that name a class.

    Attributes:
        name: of the class, one word or several.
        synonyms: other names.
    """

    name: str
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(_WORDS.search(phrase.lower()) for phrase in (self.name, *self.synonyms)):
            raise ValueError(f"a class needs a name with at least one letter or digit, got {self!r}.")

    @cached_property
    def phrases(self) -> frozenset[tuple[str, ...]]:
        """Every name as a tuple of words, also written as one word ("hot dog", "hotdog")."""
        found = set()
        for phrase in (self.name, *self.synonyms):
            words = tuple(_words(phrase))
            found |= {words, ("".join(words),)}
        return frozenset(found)

    def places(self, words: list[str]) -> Iterable[tuple[int, int]]:
        """(start, end) of every place in a list of words where the class is named, in singular or plural."""
        lengths = {len(phrase) for phrase in self.phrases}
        for start in range(len(words)):
            for length in lengths:
                window = words[start : start + length]
                if len(window) == length and self._names(window):
                    yield start, start + length

    def mentioned(self, text: str) -> bool:
        """Whether a text says that the class is there: whole words, and not only under a negation.

        "a photo without cats", "there is no cat" and "not a cat, but a dog" do not mention a cat.
        """
        for clause in _CLAUSE.split(text.lower()):
            denied = False
            for part in clause.split(","):
                words = _words(part)
                denied = denied and _STATES.isdisjoint(words)
                if any(not denied and not _denied(words[:start]) for start, _ in self.places(words)):
                    return True
                denied = denied or (_denied(words) and len(words) > 1)  # "No, a dog" denies no dog
        return False

    def _names(self, window: list[str]) -> bool:
        last = window[-1].removesuffix("'s")
        return any((*window[:-1], form) in self.phrases for form in singulars(last))


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower().replace("’", "'").replace("-", " "))


def _denied(before: list[str]) -> bool:
    followed = zip(before, [*before[1:], ""], strict=False)
    return any(
        (word in _DENIALS or word.endswith(_CONTRACTED)) and (word, following) not in _NO_DENIAL
        for word, following in followed
    )


def answered_with(text: str, words: ClassWords) -> bool | None:
    """Whether a short answer gives the class.

    The first sentence counts. An article or an opening such as "It is" before the answer does not matter, nor do
    describing words: "a small red ring" gives ring. Two classes joined by "or" are no answer.

    Returns:
        None where nothing was said (no letters or digits at all).
    """
    said = _words(text)
    if not said:
        return None
    sentence = re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0]
    return words.mentioned(sentence) and "or" not in _words(sentence)


def said_yes(text: str) -> bool | None:
    """Yes or no by whole words of the first sentence; None where it says neither or both."""
    return yes_no(text.replace("’", "'"))


@dataclass(frozen=True)
class Trap:
    """A text that a careless scorer gets wrong.

    Attributes:
        scorer: ``mention``, ``answer`` or ``yes``.
        name: of the class ("" for ``yes``).
        text: what the model wrote.
        expected: the right judgement; None: nothing was answered.
        why: the trap.
    """

    scorer: str
    name: str
    text: str
    expected: bool | None
    why: str


TRAPS: tuple[Trap, ...] = (
    *(
        Trap("mention", name, text, False, "the class is part of another word")
        for name, text in (
            ("cat", "The house is located on a hill."),
            ("bed", "As described, it is a street."),
            ("cup", "Every seat is occupied."),
            ("tie", "People enjoy parties."),
            ("car", "A man carrying a bag."),
            ("bus", "A busy street."),
            ("bear", "A man with a beard."),
            ("ring", "A string of lights during spring."),
            ("star", "A person starting a race."),
        )
    ),
    Trap("mention", "tv", "A TV on a stand.", True, "the class in other case"),
    Trap("mention", "ring", "A striped red Ring and a star.", True, "the class in other case"),
    Trap("mention", "cat", "Two cats sleep.", True, "plural"),
    Trap("mention", "cross", "There are three crosses.", True, "plural of a word in s"),
    Trap("mention", "person", "Some people at a table", False, "synonyms count only if they are given"),
    Trap("mention", "cat", "the cat's tail", True, "possessive"),
    Trap("mention", "hot dog", "a hotdog with mustard", True, "two words written as one"),
    Trap("mention", "hot dog", "a dog on a hot day", False, "the words apart and in other order"),
    Trap("mention", "teddy bear", "a brown bear", False, "only half of the name"),
    Trap("mention", "cat", "There is no cat in the picture.", False, "denied"),
    Trap("mention", "cat", "I don't see any cats.", False, "denied by a contraction"),
    Trap("mention", "cat", "I don’t see a cat", False, "denied, typographic apostrophe"),
    Trap("mention", "cat", "A room without a cat", False, "denied"),
    Trap("mention", "cat", "It is not a cat, it is a dog.", False, "denied, the other class given"),
    Trap("mention", "dog", "It is not a cat, it is a dog.", True, "the denial belongs to the other class"),
    Trap("mention", "dog", "There is no cat but a dog.", True, "the denial ends at but"),
    Trap("mention", "cat", "There is not only a cat.", True, "not only denies nothing"),
    Trap("mention", "dog", "There are no cats, dogs or birds.", False, "denied in a list"),
    Trap("mention", "bird", "There are no cats, dogs, or birds.", False, "denied in a list"),
    Trap("mention", "dog", "No, a dog.", True, "no answers the question, the dog is there"),
    Trap("mention", "cat", "", False, "nothing said"),
    Trap("answer", "circle", "", None, "nothing said counts as no answer"),
    Trap("answer", "circle", " \n.", None, "blanks and a full stop say nothing"),
    Trap("answer", "circle", "c", False, "a first letter is no class"),
    Trap("answer", "circle", "ci", False, "the start of a word is no class"),
    Trap("answer", "circle", "Circle.", True, "case and full stop"),
    Trap("answer", "circle", "It is a circle", True, "an opening"),
    Trap("answer", "circle", "a striped red circle.", True, "describing words"),
    Trap("answer", "circle", "a circle or a ring", False, "two classes offered"),
    Trap("answer", "circle", "semicircle", False, "part of another word"),
    Trap("answer", "circle", "not a circle", False, "denied"),
    Trap("answer", "circle", "A ring. Not far from it a circle.", False, "only the first sentence answers"),
    Trap("yes", "", "Yes", True, "plain"),
    Trap("yes", "", "yes, there is a cat.", True, "with more words"),
    Trap("yes", "", "No, there isn't, although yesterday there was", False, "yes inside yesterday"),
    Trap("yes", "", "Eyes are visible", None, "yes inside eyes"),
    Trap("yes", "", "There is a cat in the yesteryear poster", None, "yes inside another word"),
    Trap("yes", "", "yes and no", None, "both"),
    Trap("yes", "", "", None, "nothing said"),
    Trap("yes", "", "I know nothing about it", None, "no inside know and nothing"),
)


def judge_trap(trap: Trap) -> bool | None:
    """What our scorers say to a trap."""
    if trap.scorer == "yes":
        return said_yes(trap.text)
    words = ClassWords(trap.name)
    return words.mentioned(trap.text) if trap.scorer == "mention" else answered_with(trap.text, words)


def self_test(judge: Callable[[Trap], bool | None] = judge_trap) -> list[Trap]:
    """The traps that a scorer falls into; none for ours.

    Args:
        judge: gives a judgement on a trap, as ``judge_trap``.
    """
    return [trap for trap in TRAPS if judge(trap) is not trap.expected]
