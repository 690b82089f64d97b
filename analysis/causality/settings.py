"""How a model is asked for an object: describe the picture, is there one, what is it; and how its answer counts.

The first two wordings are those of arXiv 2410.07149. Every answer carries more than right or wrong: the probability
and the rank of the right answer's first token, and its margin over the best rival, which move long before a greedy
answer flips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .scorers import ClassWords, answered_with, said_yes
from .targets import Target

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

SETTINGS = ("generative", "polling", "vqa")
POLLING_ABSENT = "polling-absent"  # a control: the right answer is no, whatever is done to the object asked for
ALL_SETTINGS = (*SETTINGS, POLLING_ABSENT)
LENGTHS = {"generative": 128, "polling": 4, "vqa": 6, POLLING_ABSENT: 4}  # new tokens at most
_TAIL = 40  # characters before the answer that decide how its first token is written


@dataclass(frozen=True)
class Query:
    """A question with its right answer.

    Attributes:
        setting: one of ``ALL_SETTINGS``.
        question: what the user says.
        answer_start: how the model's answer is begun for it, e.g. "It is a"; may be empty.
        right: words that answer rightly, the usual one first.
        rivals: words that answer wrongly; empty: every other token is a rival.
        words: the class asked for.
        max_new_tokens: length limit of the answer.
    """

    setting: str
    question: str
    answer_start: str
    right: tuple[str, ...]
    rivals: tuple[str, ...]
    words: ClassWords
    max_new_tokens: int

    def judge(self, text: str) -> bool | None:
        """Whether a text answers rightly; None where it gives no answer (never in the generative setting)."""
        if self.setting == "generative":
            return self.words.mentioned(text)
        if self.setting == "vqa":
            return answered_with(text, self.words)
        yes = said_yes(text)
        return None if yes is None else yes == (self.setting == "polling")


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        text: the answer; after a forward pass alone, its most likely first token.
        correct: whether it is right; no answer is not right.
        abstained: whether there was no answer.
        probability: of the right answer's first token; NaN in the generative setting, as are rank and margin.
        rank: of that token among all, 1 is the best.
        margin: its log-probability minus that of the best rival's first token, in nats; for polling, of yes over no.
    """

    text: str
    correct: bool
    abstained: bool
    probability: float
    rank: float
    margin: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class AnswerTokens:
    """First tokens of answers, as they follow a prompt.

    Attributes:
        right: ids that begin a right answer, the usual spelling's first.
        rivals: ids that begin each rival; empty where every other token is a rival.
    """

    right: tuple[int, ...]
    rivals: tuple[tuple[int, ...], ...]


def query_of(
    target: Target, setting: str, answer_start: str | None = None, max_new_tokens: int | None = None
) -> Query:
    """Ask for a target.

    Args:
        target: the object.
        setting: ``generative``, ``polling``, ``vqa``, or ``polling-absent`` (a class that is not there).
        answer_start: begins the answer in the VQA setting; default "It is a" for pictures, nothing for scenes.
        max_new_tokens: length limit; default by setting.

    Raises:
        ValueError: the setting is unknown, or the target cannot be asked for so.
    """
    if setting not in ALL_SETTINGS:
        raise ValueError(f"setting={setting!r} is unknown; accepted are {', '.join(ALL_SETTINGS)}.")
    length = max_new_tokens or LENGTHS[setting]
    if setting == "generative":
        return Query(setting, "Describe the image.", "", (target.name,), (), target.words, length)
    if setting == "vqa":
        if target.question is None:
            raise ValueError(
                f"setting='vqa' needs a question for picture {target.image.name!r}; give a file of questions."
            )
        start = answer_start if answer_start is not None else "" if target.image.scene else "It is a"
        return Query(setting, target.question, start, (target.name,), target.rivals, target.words, length)
    name = target.name if setting == "polling" else target.absent
    if name is None:
        raise ValueError(f"setting={setting!r}: no class is known that picture {target.image.name!r} does not show.")
    right, wrong = ("yes", "no") if setting == "polling" else ("no", "yes")
    question = f"Is there {with_article(name)} in the image?"
    return Query(setting, question, "", (right,), (wrong,), ClassWords(name), length)


def with_article(name: str) -> str:
    """The name behind "a" or "an"."""
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def rendered(processor: ProcessorMixin, query: Query) -> str:
    """The prompt as text: chat template with one image, and the start of the answer.

    Raises:
        ValueError: the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("processor has no chat template: use an instruction-tuned checkpoint, or set one.")
    turn: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query.question}]},
    ]
    text = str(processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    if not query.answer_start:
        return text
    return f"{text}{'' if text[-1:].isspace() else ' '}{query.answer_start}"


def prepare(processor: ProcessorMixin, images: Sequence[Image], queries: Sequence[Query]) -> BatchFeature:
    """Turn one picture and one question per row into a left-padded batch, images uncompressed.

    Raises:
        ValueError: the numbers differ, or the processor has no chat template.
    """
    if len(images) != len(queries):
        raise ValueError(f"images and queries must be paired: {len(images)} images, {len(queries)} queries.")
    texts = [rendered(processor, query) for query in queries]
    inputs = processor(
        text=texts, images=[[image] for image in images], return_tensors="pt", padding=True, padding_side="left"
    )
    inputs.pop("compression", None)
    return inputs


def answer(model: PreTrainedModel, processor: ProcessorMixin, inputs: Any, queries: Sequence[Query]) -> list[Outcome]:
    """Answer greedily, by one ``generate`` call under whatever interventions are active.

    Args:
        model: a supported model.
        processor: its processor.
        inputs: of ``prepare``, passed on as they are.
        queries: one per row.
    """
    output = model.generate(
        **inputs,
        **uncompressed(model),
        do_sample=False,
        max_new_tokens=max(query.max_new_tokens for query in queries),
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [
        outcome_of(processor, query, logits, text.strip())
        for query, logits, text in zip(queries, output.logits[0], texts, strict=True)
    ]


def answer_forward(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: Any, queries: Sequence[Query]
) -> list[Outcome]:
    """Answer by the first token alone, from one forward pass; see ``answer``. Not for the generative setting."""
    import torch

    with torch.no_grad():
        logits = model(**inputs, **uncompressed(model), logits_to_keep=1).logits[:, -1]
    return [outcome_of(processor, query, row) for query, row in zip(queries, logits, strict=True)]


def uncompressed(model: Any) -> dict[str, str]:
    """Call arguments that keep a model of ours from compressing its prompt; none for a stock model."""
    from dualstream.modeling.compressed_model import VisualCompressionMixin

    return {"compression": "none"} if isinstance(model, VisualCompressionMixin) else {}


def outcome_of(processor: ProcessorMixin, query: Query, logits: torch.Tensor, text: str | None = None) -> Outcome:
    """Judge an answer.

    Args:
        processor: its tokenizer tells the first tokens of the answers.
        query: what was asked.
        logits: (V,) of the answer's first token.
        text: the generated answer; None where there is only the first token. Then the answer is right if the most
            likely token begins a right answer, by its id and not by its letters.

    Raises:
        ValueError: a generative answer without a text.
    """
    import torch

    log_p = logits.float().log_softmax(-1)
    tokens = answer_tokens(processor, query)
    right = log_p[list(tokens.right)]
    best = int(log_p.argmax())
    if query.setting == "generative":
        if text is None:
            raise ValueError("setting='generative' needs generated text, not a first token alone.")
        measures = (float("nan"),) * 3
    else:
        if tokens.rivals:
            rival = torch.stack([log_p[list(ids)].logsumexp(0) for ids in tokens.rivals]).max()
        else:
            rival = log_p.scatter(0, torch.tensor(tokens.right, device=log_p.device), float("-inf")).max()
        probability = float(right.logsumexp(0).exp())
        rank = float((log_p > right.max()).sum() + 1)
        measures = (probability, rank, float(right.logsumexp(0) - rival))
    if text is None:
        verdict: bool | None = best in tokens.right
        text = processor.tokenizer.decode([best])
    else:
        verdict = query.judge(text)
    return Outcome(text, verdict is True, verdict is None, *measures)


def right_token(processor: ProcessorMixin, query: Query) -> int:
    """Id of the right answer's first token in its usual spelling."""
    return answer_tokens(processor, query).right[0]


@lru_cache(maxsize=1024)
def answer_tokens(processor: ProcessorMixin, query: Query) -> AnswerTokens:
    """First tokens of right and wrong answers as they follow this prompt, without special tokens.

    A token that could begin both counts as right only. In other spellings (capital letter, with or without a blank) a
    word counts where it is a single token; the first piece of a longer one could begin many words.
    """
    tail = rendered(processor, query)[-_TAIL:]
    right = tuple(dict.fromkeys(i for word in query.right for i in first_tokens(processor.tokenizer, tail, word)))
    rivals = []
    for word in query.rivals:
        ids = tuple(i for i in first_tokens(processor.tokenizer, tail, word) if i not in right)
        rivals += [ids] if ids else []
    return AnswerTokens(right, tuple(rivals))


@lru_cache(maxsize=4096)
def first_tokens(tokenizer: Any, tail: str, word: str) -> tuple[int, ...]:
    """Ids that can begin a word behind a text, that of the usual spelling first.

    Args:
        tokenizer: of the model.
        tail: end of the prompt.
        word: the answer.

    Returns:
        At least one id.
    """
    blank = "" if tail[-1:].isspace() else " "
    usual = _behind(tokenizer, tail, blank + word) or tokenizer(word, add_special_tokens=False).input_ids
    found = [usual[0]]
    for spelling in (word, word[:1].upper() + word[1:], word.upper()):
        for text in (f" {spelling}", spelling):
            ids = _behind(tokenizer, tail, text)
            if len(ids) == 1:
                found += ids
    unknown = tokenizer.unk_token_id
    return tuple(dict.fromkeys(i for i in found if i != unknown or i == usual[0]))


def _behind(tokenizer: Any, tail: str, text: str) -> list[int]:
    """Ids that a text adds behind another one; empty where it changes the other one's tokens."""
    before = tokenizer(tail, add_special_tokens=False).input_ids
    both = tokenizer(tail + text, add_special_tokens=False).input_ids
    return both[len(before) :] if both[: len(before)] == before else []
