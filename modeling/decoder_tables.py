"""What a visual decoder knows of the vocabulary: which tokens mean nothing, which read alike, which share a class."""

import unicodedata
from typing import Any
from weakref import WeakKeyDictionary

import torch

UNKNOWN_CLASS = -1
Tables = tuple[torch.Tensor, torch.Tensor]
# What tokenizers that are still in use were found to say, by everything in them that could have changed since.
_KNOWN: WeakKeyDictionary[Any, dict[Any, Tables]] = WeakKeyDictionary()


def token_tables(tokenizer: Any, vocab_size: int) -> Tables:
    """Describe every vocabulary entry by its text.

    A tokenizer object is asked once: 150,000 entries take about two seconds, and every ``compressing`` block of a
    model without a decoder of its own needs them.

    Args:
        tokenizer: any transformers tokenizer.
        vocab_size: V, the rows of the output matrix (often more than the tokenizer has).

    Returns:
        meaningless: (V,) bool, true if the stripped text is empty or holds only characters of the Unicode categories
            P, S, Z and C (so pieces of a broken character, which decode to the replacement sign, count), for special
            and added tokens, and beyond the tokenizer.
        text_class: (V,) long, the first id with the same stripped text.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    key = vocab_size, len(tokenizer), frozenset(special)
    tables = _KNOWN.setdefault(tokenizer, {})
    if key not in tables:
        tables[key] = _described(tokenizer, vocab_size, special)
    meaningless, text_class = tables[key]
    return meaningless.clone(), text_class.clone()


def _described(tokenizer: Any, vocab_size: int, special: set[int]) -> Tables:
    known = min(vocab_size, len(tokenizer))
    texts = [text.strip() for text in tokenizer.batch_decode([[index] for index in range(known)])]
    meaningless = torch.ones(vocab_size, dtype=torch.bool)
    text_class = torch.arange(vocab_size)
    first_with_text: dict[str, int] = {}
    for index, text in enumerate(texts):
        meaningless[index] = index in special or all(unicodedata.category(char)[0] in "PSZC" for char in text)
        text_class[index] = first_with_text.setdefault(text, index)
    return meaningless, text_class


def check_classes(token_classes: torch.Tensor, class_tokens: torch.Tensor, vocab_size: int) -> None:
    """Check that two class tables fit each other and the vocabulary.

    Raises:
        ValueError: naming the table and what is wrong with it.
    """
    if token_classes.shape != (vocab_size,):
        raise ValueError(f"token_classes has shape {tuple(token_classes.shape)}; expected ({vocab_size},)")
    if class_tokens.ndim != 1 or not len(class_tokens):
        raise ValueError(f"class_tokens has shape {tuple(class_tokens.shape)}; expected one token id per class")
    other = len(class_tokens) - 1
    if int(token_classes.min()) < 0 or int(token_classes.max()) > other:
        raise ValueError(f"token_classes must lie within 0..{other}, as class_tokens names {other + 1} classes")
    if int(class_tokens.min()) < 0 or int(class_tokens.max()) >= vocab_size:
        raise ValueError(f"class_tokens must be vocabulary ids, 0..{vocab_size - 1}")
    wrong = token_classes[class_tokens.long()].cpu() != torch.arange(other + 1)
    if not bool((token_classes == other).any()):
        wrong[other] = False  # an empty rest is never read rightly, so any token may stand for it
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"class_tokens[{index}]={int(class_tokens[index])} belongs to class "
            f"{int(token_classes[class_tokens[index].long()])}: a class must read as a token of its own"
        )


def resized_tables(tables: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Fit the tables of a decoder to a vocabulary that grew or shrank at its end.

    Args:
        tables: ``meaningless`` (V,) and ``text_class`` (V,), with ``token_classes`` (V,) and ``class_tokens`` (C,)
            where there are classes.
        vocab_size: the new V.

    Returns:
        New tables. New tokens count as meaningless (if tokens are known at all) and belong to the class "other". A
        class whose token is gone reads as the first token left to it, else as the one of "other", else as token 0.
    """
    old_size = len(tables["meaningless"])
    kept = min(old_size, vocab_size)
    known = old_size > 0 and int(tables["text_class"][0]) != UNKNOWN_CLASS
    meaningless = tables["meaningless"].new_full((vocab_size,), known)
    text_class = torch.arange(vocab_size, device=meaningless.device)
    text_class = text_class if known else text_class.fill_(UNKNOWN_CLASS)
    meaningless[:kept], text_class[:kept] = tables["meaningless"][:kept], tables["text_class"][:kept]
    resized = {"meaningless": meaningless, "text_class": text_class}
    if "class_tokens" in tables:
        class_tokens, old_classes = tables["class_tokens"], tables["token_classes"]
        token_classes = old_classes.new_full((vocab_size,), len(class_tokens) - 1)
        token_classes[:kept] = old_classes[:kept]
        ids = torch.arange(vocab_size, device=class_tokens.device)
        first_left = torch.full_like(class_tokens, vocab_size).scatter_reduce_(0, token_classes.long(), ids, "amin")
        tokens = torch.where(class_tokens < vocab_size, class_tokens, first_left)
        spare = torch.where(tokens[-1] < vocab_size, tokens[-1], 0)
        resized |= {"token_classes": token_classes, "class_tokens": torch.where(tokens < vocab_size, tokens, spare)}
    return resized
