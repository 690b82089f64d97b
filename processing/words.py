"""Turn vocabulary ids into words that a person can read, one id at a time.

Decoding a single id through a tokenizer loses information: SentencePiece tokenizers strip the blank that marks the
start of a word, and byte-level ones turn the parts of a character into replacement signs. So the vocabulary entry
itself is read here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

BLANK = "␣"
EMPTY = "∅"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES_ONLY = re.compile(r"(\\x[0-9a-f]{2})+")
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def decode_pieces(tokenizer: Any, ids: Iterable[int] | np.ndarray) -> dict[int, str]:
    r"""Text of every given id by itself, with its leading blank where the id starts a word.

    Bytes that are only part of a character come out as escapes such as ``\xe4``; an id the tokenizer does not know
    (models pad their vocabulary) as ``<id 32010>``.

    Args:
        tokenizer: a Hugging Face tokenizer, byte-level BPE, SentencePiece style or plain words.
        ids: vocabulary ids of any shape; repeated ids are decoded once.

    Returns:
        Mapping from id to text.
    """
    unique = np.unique(np.asarray(ids, dtype=np.int64)).tolist()
    vocabulary = tokenizer.get_vocab()
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    to_byte = _byte_alphabet()
    byte_level = to_byte.keys() <= vocabulary.keys()
    known = set(vocabulary.values())
    pieces = {}
    for number in unique:
        piece = tokenizer.convert_ids_to_tokens(number) if number in known else None
        if piece is None:
            pieces[number] = f"<id {number}>"
        elif piece in added:
            pieces[number] = piece
        elif match := _BYTE_PIECE.fullmatch(piece):
            pieces[number] = _text_of_bytes(bytes([int(match[1], 16)]))
        elif byte_level and all(letter in to_byte for letter in piece):
            pieces[number] = _text_of_bytes(bytes(to_byte[letter] for letter in piece))
        else:
            pieces[number] = piece.replace("▁", " ")
    return pieces


def visible(piece: str) -> str:
    """A piece as it is shown in a cell: no blank around it, nothing invisible.

    Control and format characters are escaped, a piece of blanks alone shows one ``␣`` each, an empty one ``∅``.
    """
    if not piece:
        return EMPTY
    text = piece.strip(" ") or BLANK * len(piece)
    return "".join(_visible_letter(letter) for letter in text)


def has_meaning(piece: str) -> bool:
    """Whether a piece holds anything but punctuation, symbols, blanks, control characters and parts of characters."""
    return not _BYTES_ONLY.fullmatch(piece) and any(unicodedata.category(letter)[0] not in "PSZC" for letter in piece)


def _visible_letter(letter: str) -> str:
    """One character, escaped where it would not show or would change how its neighbours show."""
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    category = unicodedata.category(letter)
    if category == "Zs":
        return BLANK
    if category[0] == "C" or category in ("Zl", "Zp"):
        return letter.encode("ascii", "backslashreplace").decode() if ord(letter) > 127 else f"\\x{ord(letter):02x}"
    return letter


def _text_of_bytes(data: bytes) -> str:
    """Bytes as UTF-8 text, those that form no whole character as escapes."""
    return data.decode("utf-8", errors="backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """The 256 letters by which byte-level BPE vocabularies (GPT-2 and its heirs) write bytes.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100, U+0101, ...
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
