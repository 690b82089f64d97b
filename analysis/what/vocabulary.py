"""Tables over the vocabulary, so that grids of ids are looked up instead of being decoded.

A vocabulary entry says a word if it *is* the word: its text without the blank before it, in lower case, equals the
word or its plural. Entries that are only part of a word (``um`` of ``umbrella``) do not count, unless first pieces are
asked for: then the first piece of a word counts, too, if it has three letters or more and is the first piece of no
other word in the schema. What was matched how is part of every report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualstream.eval.hallucination import singulars
from dualstream.processing import decode_pieces, has_meaning

from .labels import LabelSchema

NOTHING = -1
LEAST_LETTERS = 3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What every id of a model's vocabulary says under a schema.

    Attributes:
        pieces: (V,) text of every id, with its leading blank.
        words: the W words of the schema: those of all labels, then all attributes.
        word: (V,) int32, index of the word an id says, -1 for none.
        label: (V,) int32, label of that word, -1 for none.
        meaningful: (V,) bool, whether an id says anything but punctuation, blanks and the like; not so for special
            tokens.
        schema: the schema.
    """

    pieces: tuple[str, ...]
    words: tuple[str, ...]
    word: np.ndarray
    label: np.ndarray
    meaningful: np.ndarray
    schema: LabelSchema

    def ids_of(self, words: Iterable[str]) -> list[int]:
        """All ids that say one of some words."""
        wanted = [self.words.index(word) for word in words if word in self.words]
        return np.flatnonzero(np.isin(self.word, wanted)).tolist()

    def tracked_labels(self) -> dict[str, list[int]]:
        """Name of every label that an id can say -> those ids."""
        ids = {label.name: self.ids_of(label.words) for label in self.schema.labels}
        return {name: found for name, found in ids.items() if found}

    def tracked_attributes(self) -> dict[str, list[int]]:
        """Every attribute word that an id can say -> those ids."""
        ids = {word: self.ids_of([word]) for word in self.schema.attribute_words}
        return {word: found for word, found in ids.items() if found}

    def unreadable(self) -> list[str]:
        """Labels that no id can say: they read as absent whatever the model sees."""
        return [label.name for label in self.schema.labels if not self.ids_of(label.words)]


def vocabulary_pieces(tokenizer: Any, size: int) -> tuple[str, ...]:
    """Text of every id below `size`, the number of rows of the output matrix."""
    return tuple(decode_pieces(tokenizer, range(size)).values())


def make_vocabulary(
    pieces: Sequence[str],
    schema: LabelSchema,
    special: Iterable[int] = (),
    first_pieces: Mapping[str, int] | None = None,
) -> Vocabulary:
    """Look up what every id says.

    Args:
        pieces: text of every id.
        schema: labels and attributes.
        special: ids of special tokens, which say nothing.
        first_pieces: word -> id of its first piece, from ``first_piece_ids``; None: whole words only.
    """
    words = (*(word for label in schema.labels for word in label.words), *schema.attribute_words)
    index = {word: number for number, word in enumerate(words)}
    silent = set(special)
    said = np.full(len(pieces), NOTHING, np.int32)
    for number, piece in enumerate(pieces):
        if number not in silent:
            said[number] = _word_of(piece, index)
    for word, number in (first_pieces or {}).items():
        if said[number] == NOTHING:
            said[number] = index[word]
    label_of = np.array([schema.label_of_word.get(word, NOTHING) for word in words] + [NOTHING], np.int32)
    meaningful = np.array([number not in silent and has_meaning(piece) for number, piece in enumerate(pieces)], bool)
    return Vocabulary(tuple(pieces), words, said, label_of[said], meaningful, schema)


def first_piece_ids(tokenizer: Any, schema: LabelSchema) -> dict[str, int]:
    """Word of a schema -> id of its first piece, where that piece can stand for it; see the head of this module."""
    words = (*(word for label in schema.labels for word in label.words), *schema.attribute_words)
    pieces = {}
    for word in words:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        texts = decode_pieces(tokenizer, ids)
        pieces[word] = next((number for number in ids if texts[number].strip()), None)
    counts, texts = Counter(pieces.values()), decode_pieces(tokenizer, [i for i in pieces.values() if i is not None])
    return {
        word: number
        for word, number in pieces.items()
        if number is not None and counts[number] == 1 and len(texts[number].strip()) >= LEAST_LETTERS
    }


def word_ids(tokenizer: Any, words: Iterable[str]) -> dict[str, list[int]]:
    """Ids that say each of some words, in any case and with or without the blank before it; no id: left out."""
    vocabulary = tokenizer.get_vocab()
    wanted = {word: word.strip().lower() for word in words}
    texts = decode_pieces(tokenizer, sorted(vocabulary.values()))
    by_text: dict[str, list[int]] = {}
    for number, text in texts.items():
        by_text.setdefault(text.strip().lower(), []).append(number)
    return {word: by_text[text] for word, text in wanted.items() if text in by_text}


def _word_of(piece: str, index: dict[str, int]) -> int:
    text = piece.strip().lower()
    return next((index[form] for form in singulars(text) if form in index), NOTHING) if text else NOTHING
