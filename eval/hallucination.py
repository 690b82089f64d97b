"""Objects that answers make up: CHAIR on captions, POPE on yes/no questions.

CHAIR needs a file of synonyms, one object per line, its words separated by commas, the object's name first. The file
of the 80 COCO objects is data that its authors hand out; it is not part of this package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .spatial_tasks.parsing import official_yes_no, yes_no

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_NO_OBJECTS = ("home plate", "train track")  # neither a plate nor a train
_IRREGULAR = {"men": "man", "women": "woman", "mice": "mouse", "geese": "goose", "knives": "knife", "calves": "calf"}


class ObjectWords:
    """Which words name which object.

    Args:
        lines: of a file of synonyms: comma-separated words, the first one names the object.

    Raises:
        ValueError: there is no word at all.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.names: dict[str, str] = {}
        for line in lines:
            words = [" ".join(word.lower().split()) for word in line.split(",")]
            for word in filter(None, words):
                self.names.setdefault(word, words[0])
        if not self.names:
            raise ValueError("the file of synonyms has no words; expected one object per line, words between commas.")
        self._phrases = self.names | dict.fromkeys(_NO_OBJECTS, "")
        for animal in _ANIMALS:
            self._phrases |= {f"{age} {animal}": self.names.get(animal, "") for age in ("baby", "adult")}
        for vehicle in _VEHICLES:
            self._phrases[f"passenger {vehicle}"] = self.names.get(vehicle, "")
        self._longest = max(len(phrase.split()) for phrase in self._phrases)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ObjectWords:
        """Read a file of synonyms."""
        return cls(Path(path).read_text(encoding="utf-8").splitlines())

    def mentions(self, caption: str) -> list[str]:
        """The objects a caption mentions, in order, each as often as it is mentioned.

        Whole words, singular or plural, longest phrase first: "hot dog" is no dog, "a baby elephant" no baby. A seat
        does not count as a chair where the caption has a toilet.
        """
        words = re.findall(r"[a-z0-9']+", caption.lower().replace("'s ", " "))
        found = list(self._scan(words))
        if any(word == "toilet" for word, _ in found):
            found = [(word, name) for word, name in found if word != "seat"]
        return [name for _, name in found if name]

    def _scan(self, words: Sequence[str]) -> Iterator[tuple[str, str]]:
        start = 0
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                phrase = self._known(words[start : start + length])
                if phrase is not None:
                    yield phrase, self._phrases[phrase]
                    break
            start += length

    def _known(self, words: Sequence[str]) -> str | None:
        head = words[:-1]
        candidates = (" ".join([*head, last]) for last in singulars(words[-1]))
        return next((phrase for phrase in candidates if phrase in self._phrases), None)


def singulars(word: str) -> list[str]:
    """The word itself and what it may be the plural of, most likely first."""
    forms = [word]
    if word in _IRREGULAR:
        forms.append(_IRREGULAR[word])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
    if word.endswith("es"):
        forms.append(word[:-2])
    return forms


def chair(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    words: ObjectWords,
    reference_captions: Sequence[Iterable[str]] | None = None,
) -> dict[str, Any]:
    """CHAIR of captions.

    Args:
        captions: what a model wrote, one per picture.
        objects: names of the objects that each picture shows.
        words: the vocabulary.
        reference_captions: people's captions of each picture; what they mention is there, too.

    Returns:
        ``chair_i`` (share of mentions of objects that are not there; None without any mention), ``chair_s`` (share of
        captions with such a mention), ``recall`` (share of the objects there that are mentioned; None if no picture
        shows any), ``length`` (mean number of words), ``mentions``, ``hallucinated`` and ``captions`` (counts). Few
        words make few mistakes, so the two shares mean little without recall and length.

    Raises:
        ValueError: there are no captions, the lists differ in length, or an object is not in the vocabulary.
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(f"captions and objects must be paired: {len(captions)} and {len(objects)} given.")
    references = [()] * len(captions) if reference_captions is None else reference_captions
    if len(references) != len(captions):
        raise ValueError(f"reference_captions must be paired: {len(references)} for {len(captions)} captions.")
    mentions = made_up = sentences = seen = present = 0
    for caption, names, others in zip(captions, objects, references, strict=True):
        there = {_name(name, words) for name in names}
        there |= {name for other in others for name in words.mentions(other)}
        said = words.mentions(caption)
        wrong = sum(name not in there for name in said)
        mentions, made_up, sentences = mentions + len(said), made_up + wrong, sentences + (wrong > 0)
        seen, present = seen + len(there & set(said)), present + len(there)
    return {
        "chair_i": made_up / mentions if mentions else None,
        "chair_s": sentences / len(captions),
        "recall": seen / present if present else None,
        "length": sum(len(caption.split()) for caption in captions) / len(captions),
        "mentions": mentions,
        "hallucinated": made_up,
        "captions": len(captions),
    }


def _name(name: str, words: ObjectWords) -> str:
    plain = " ".join(name.lower().split())
    if plain not in words.names:
        raise ValueError(f"object {name!r} is not in the vocabulary of {len(set(words.names.values()))} objects.")
    return words.names[plain]


def pope(answers: Sequence[str], truths: Sequence[str]) -> dict[str, Any]:
    """POPE of answers: "yes" is the positive class, and everything that does not say no counts as yes.

    Args:
        answers: what a model wrote.
        truths: ``yes`` or ``no``.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1`` (0 where undefined), ``yes_ratio`` (of the answers, not of the
        truths), ``invalid`` (share of answers that say neither or both) and ``n``.

    Raises:
        ValueError: there are no answers, the lists differ in length, or a truth is neither yes nor no.
    """
    if not answers or len(answers) != len(truths):
        raise ValueError(f"answers and truths must be paired: {len(answers)} and {len(truths)} given.")
    unknown = sorted({truth for truth in truths if truth.strip().lower() not in ("yes", "no")})
    if unknown:
        raise ValueError(f"truths are {unknown}; accepted are yes and no.")
    said = [official_yes_no(answer) for answer in answers]
    true = [truth.strip().lower() == "yes" for truth in truths]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(true))
    return {
        "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": sum(said) / len(said),
        "invalid": sum(yes_no(answer) is None for answer in answers) / len(said),
        "n": len(said),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
