"""Generation settings of a task, in the harness's words, as arguments of ``generate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

DEFAULT_MAX_NEW_TOKENS = 1024
RENAMED = {"max_gen_toks": "max_new_tokens", "stop_sequences": "until"}
# Settings of other backends that say nothing about decoding.
IGNORED = frozenset({"image_aspect_ratio", "visual_cot", "max_agentic_steps", "skip_special_tokens", "seed"})
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationSettings:
    """How to write an answer.

    Attributes:
        options: arguments of ``generate``, sorted by name.
        stops: texts that end an answer; it is cut before the first of them.
    """

    options: tuple[tuple[str, Any], ...]
    stops: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Return the text up to the first stop."""
        ends = [text.find(stop) for stop in self.stops]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


def read_generation_settings(given: Mapping[str, Any]) -> GenerationSettings:
    """Read a task's ``generation_kwargs``; they are not changed.

    Decoding is greedy unless the temperature is above 0 and ``do_sample`` is not false; a ``do_sample: true`` with no
    temperature samples at the model's own.

    Args:
        given: names of ``generate``, ``until`` (a text or a list of them), and what other backends use.

    Raises:
        ValueError: a setting is unknown or ``until`` is no text.
    """
    named = {RENAMED.get(name, name): value for name, value in given.items() if name not in IGNORED}
    stops = _texts(named.pop("until", None))
    known = GenerationConfig().to_dict().keys()
    unknown = sorted(named.keys() - known)
    if unknown:
        raise ValueError(
            f"generation_kwargs: {', '.join(unknown)} is no setting of generate; accepted are until and the fields of "
            "transformers.GenerationConfig, e.g. max_new_tokens, do_sample, temperature, top_p, top_k, num_beams."
        )
    options = {name: value for name, value in named.items() if value is not None}
    options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    temperature = options.get("temperature")
    warm = temperature is None or float(temperature) > 0
    sample = warm and bool(options.get("do_sample", temperature is not None))
    if not sample:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    options["do_sample"] = sample
    return GenerationSettings(tuple(sorted(options.items())), stops)


def _texts(until: Any) -> tuple[str, ...]:
    texts: Iterable[Any] = [until] if isinstance(until, str) else until or []
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"generation_kwargs: until={until!r} is not accepted; give a text or a list of texts.")
    return tuple(text for text in texts if text)
