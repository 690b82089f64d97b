"""Which classes a pruned decoder needs: what the teacher reads in the training pictures, merged by normal form."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dualstream.modeling import family_of, token_tables
from dualstream.modeling.lens import image_features_and_states, unwrapped
from dualstream.modeling.visual_decoder import top_k_tokens

from .distillation_config import DistillationConfig
from .image_dataset import ImageCollator

OTHER = "other"


@dataclass(frozen=True)
class Coverage:
    """What a choice of classes keeps of the readings it was made from.

    Attributes:
        readings: image positions that were read.
        forms_seen: normal forms among them.
        classes: classes chosen, "other" included.
        tokens_merged: vocabulary entries that share one of the kept classes.
        covered: share of the readings that fall into a kept class and not into "other".
        other_token: text of the token "other" reads as.
    """

    readings: int
    forms_seen: int
    classes: int
    tokens_merged: int
    covered: float
    other_token: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ClassTables:
    """Classes of a pruned decoder; the last one is "other".

    Attributes:
        token_classes: (V,) int32, the class of every vocabulary entry.
        class_tokens: (C,) long, the vocabulary entry a class reads as; it belongs to the class.
        coverage: what they keep.
    """

    token_classes: torch.Tensor
    class_tokens: torch.Tensor
    coverage: Coverage


def normal_forms(texts: Sequence[str], meaningless: Sequence[bool]) -> list[tuple[bool, str]]:
    """What tokens are merged by: their text in Unicode NFKC, without distinction of case and without outer blanks.

    Args:
        texts: decoded text of every vocabulary entry.
        meaningless: whether it counts as meaningless; such a token never merges with one that has a meaning, though
            normalisation may make a word of it (the sign TM becomes "tm").

    Returns:
        One hashable form per entry.
    """
    forms = []
    for text, flag in zip(texts, meaningless, strict=True):
        # Folding case can undo the normalisation and the other way round, so normalise on both sides of it.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        forms.append((bool(flag), folded.strip()))
    return forms


def choose_classes(
    counts: torch.Tensor, texts: Sequence[str], meaningless: Sequence[bool], max_classes: int
) -> ClassTables:
    """Keep the most frequent normal forms as classes of their own; the rest becomes "other".

    Args:
        counts: (V,) how often the teacher read every vocabulary entry.
        texts: decoded text of every entry; an empty text for entries beyond the tokenizer.
        meaningless: (V,) flags.
        max_classes: largest number of classes, "other" included, at least 2.

    Returns:
        The tables. A class reads as its most frequent entry; "other" as the entry whose text is "other" if no kept
        class has it, else as the most frequent entry that was left out, one with a meaning before one without.

    Raises:
        ValueError: sizes disagree, nothing was counted, max_classes < 2, or the vocabulary has a single normal form.
    """
    size = len(counts)
    if not len(texts) == len(meaningless) == size:
        raise ValueError(
            f"counts, texts and meaningless must have one entry per token: {size}, {len(texts)}, {len(meaningless)}."
        )
    if max_classes < 2:
        raise ValueError(f"max_classes={max_classes} must be at least 2: one class and the rest.")
    total = int(counts.sum())
    if total == 0:
        raise ValueError("counts holds no readings: classes are chosen from what the teacher reads.")
    forms = normal_forms(texts, meaningless)
    members: dict[tuple[bool, str], list[int]] = {}
    for token, form in enumerate(forms):
        members.setdefault(form, []).append(token)
    if len(members) < 2:
        raise ValueError("all tokens have the same normal form; a pruned decoder needs at least two.")
    frequency = {form: int(counts[tokens].sum()) for form, tokens in members.items()}
    seen = sorted((form for form in members if frequency[form]), key=lambda form: -frequency[form])
    kept = seen[: min(max_classes, len(members)) - 1]

    token_classes = torch.full((size,), len(kept), dtype=torch.int32)
    for index, form in enumerate(kept):
        token_classes[members[form]] = index
    class_tokens = [_most_frequent(members[form], counts) for form in kept]
    left_out = (token_classes == len(kept)).nonzero().flatten().tolist()
    class_tokens.append(_other_token(left_out, counts, forms))
    coverage = Coverage(
        readings=total,
        forms_seen=len(seen),
        classes=len(class_tokens),
        tokens_merged=size - len(left_out),
        covered=sum(frequency[form] for form in kept) / total,
        other_token=texts[class_tokens[-1]].strip(),
    )
    return ClassTables(token_classes, torch.tensor(class_tokens), coverage)


def _most_frequent(tokens: list[int], counts: torch.Tensor) -> int:
    """The most frequent token, the first of equals."""
    return tokens[int(counts[tokens].argmax())]


def _other_token(left_out: list[int], counts: torch.Tensor, forms: list[tuple[bool, str]]) -> int:
    named = [token for token in left_out if forms[token] == (False, OTHER)]
    if named:
        return _most_frequent(named, counts)
    meaningful = [token for token in left_out if not forms[token][0]]
    return _most_frequent(meaningful or left_out, counts)


@torch.no_grad()
def count_readings(
    model: Any, processor: Any, images: Dataset, count: int, depth: int, final_norm: bool, batch_size: int
) -> torch.Tensor:
    """Count what the language model reads at every image position of the first pictures.

    Args:
        model: a supported model.
        processor: its processor.
        images: RGB images.
        count: how many of them.
        depth: blocks of the language model to run.
        final_norm: whether the states pass the final norm.
        batch_size: images at a time.

    Returns:
        (V,) long on the CPU.
    """
    model = unwrapped(model)
    family, head, collator = family_of(model), family_of(model).unembedding(model), ImageCollator(processor)
    counts = torch.zeros(head.weight.shape[0], dtype=torch.long)
    for begin in tqdm(range(0, count, batch_size), desc="classes", unit="batch", disable=None):
        inputs = collator([images[index] for index in range(begin, min(begin + batch_size, count))])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        states = image_features_and_states(model, inputs, depth)[1]
        states = family.final_norm(model)(states) if final_norm else states
        counts += top_k_tokens(states, head.weight, bias=head.bias)[0][:, 0].cpu().bincount(minlength=len(counts))
    return counts


def read_classes(config: DistillationConfig, model: Any, processor: Any, images: Any) -> ClassTables:
    """Choose classes as a configuration asks for."""
    count = len(images) if config.class_images is None else min(config.class_images, len(images))
    blocks = len(family_of(model).llm_blocks(model))
    depth = blocks if config.teacher_depth is None else config.teacher_depth
    counts = count_readings(
        model, processor, images, count, depth, config.final_norm, config.per_device_eval_batch_size
    )
    tokenizer, size = processor.tokenizer, len(counts)
    meaningless, _ = token_tables(tokenizer, size)
    texts = tokenizer.batch_decode([[index] for index in range(min(size, len(tokenizer)))])
    texts += [""] * (size - len(texts))
    return choose_classes(counts, texts, meaningless.tolist(), config.max_classes)
