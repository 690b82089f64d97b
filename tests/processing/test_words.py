"""Vocabulary ids as readable words, for byte-level and SentencePiece-style tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from dualstream.processing.words import BLANK, decode_pieces, has_meaning, visible


def sentencepiece_tokenizer():
    """LLaMA's layout: ▁ for blanks, <0x..> for bytes."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "▁dog", "dog", "▁", "▁▁▁", "<0xE4>", "<0x0A>", "<0x41>", "你", "Ġ", ","]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>"), pieces


def test_sentencepiece_pieces_keep_their_leading_blank() -> None:
    tokenizer, pieces = sentencepiece_tokenizer()
    assert tokenizer.decode([2]) == tokenizer.decode([3]) == "dog"  # what decoding an id by itself loses
    texts = decode_pieces(tokenizer, range(len(pieces) + 1))
    assert texts == {
        0: "<unk>", 1: "<s>", 2: " dog", 3: "dog", 4: " ", 5: "   ", 6: r"\xe4", 7: "\n", 8: "A", 9: "你",
        10: "Ġ", 11: ",", 12: "<id 12>",
    }  # fmt: skip


def test_byte_level_pieces_show_parts_of_characters_as_bytes(make_tokenizer) -> None:
    tokenizer = make_tokenizer(image_token="<image>")
    ids = tokenizer("dog 你\n", add_special_tokens=False)["input_ids"]
    texts = [decode_pieces(tokenizer, ids)[number] for number in ids]
    assert texts == [" dog", " ", r"\xe4", r"\xbd", r"\xa0", "\n"]
    assert decode_pieces(tokenizer, [tokenizer.convert_tokens_to_ids("<image>")]).popitem()[1] == "<image>"
    assert decode_pieces(tokenizer, []) == {}


@given(st.text(max_size=12))
def test_byte_level_pieces_together_are_the_text(make_tokenizer, text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = decode_pieces(tokenizer, ids)
    joined = "".join(texts[number] for number in ids)
    if text.isascii() and not text.startswith(" ") and text:
        assert joined == " " + text  # the tokenizer marks the start of the first word


@pytest.mark.parametrize(
    ("piece", "shown"),
    [(" dog", "dog"), ("dog", "dog"), ("", "∅"), ("  ", BLANK * 2), ("\n", r"\n"), ("a\tb", r"a\tb"),
     ("\x07", r"\x07"), ("\u202eevil", r"\u202eevil"), ("\u2028", r"\u2028"), ("a\xa0b", f"a{BLANK}b"), ("你", "你"),
     ("é", "é"), (r"\xe4", r"\xe4")],
)  # fmt: skip
def test_nothing_shown_is_invisible(piece: str, shown: str) -> None:
    assert visible(piece) == shown


@given(st.text(max_size=6))
def test_visible_text_is_never_empty_nor_breaks_a_line(piece: str) -> None:
    shown = visible(piece)
    assert shown and shown.isprintable()


@pytest.mark.parametrize(
    ("piece", "meant"),
    [(" dog", True), (" 7", True), (",", False), (" ", False), ("", False), ("\n", False), (r"\xe4\xbd", False),
     ("°$", False), ("a.", True)],
)  # fmt: skip
def test_meaning_is_more_than_punctuation(piece: str, meant: bool) -> None:
    assert has_meaning(piece) is meant
