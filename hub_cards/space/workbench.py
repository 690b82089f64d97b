"""What the Space does, without a word of its interface: read a picture, ask about it with and without."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from dualstream.analysis.what_report.series import ModelSource
from dualstream.processing.token_map_html import render_page

if TYPE_CHECKING:
    from PIL.Image import Image

STOCK = "stock"
FULL = "all tokens"
SCALINGS = (STOCK, "poly:99:8", "poly:9:8", "sigmoid", "exp")
COMPRESSIONS = ("rle", "rle_drop_top1", "rle_drop_top2", "paper:rle", "none")
FRAME_HEIGHT = 980  # pixels of the page inside the page
MAX_QUESTION = 500  # letters
NEW_TOKENS = 32


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        model: its name.
        rope: scaling of the vision tower's RoPE.
        prompt: what was done to the visual tokens.
        answer: the text.
        kept: visual tokens that reached the language model.
        total: visual tokens of the picture.
    """

    model: str
    rope: str
    prompt: str
    answer: str
    kept: int
    total: int

    @property
    def row(self) -> list[str]:
        """The cells of a table."""
        saved = f"{100 * (1 - self.kept / self.total):.0f} %" if self.total else ""
        return [self.model, self.rope, self.prompt, self.answer, f"{self.kept} of {self.total}", saved]


class Workbench:
    """Models that are loaded when they are first asked for, and used by one request at a time.

    Args:
        names: embedded names, folders or Hub ids.
        device: where they run; None: an accelerator if there is one.
        dtype: of their weights.
    """

    def __init__(self, names: Sequence[str], device: str | None = None, dtype: str = "auto") -> None:
        if not names:
            raise ValueError("names must hold at least one model.")
        self.names, self.device, self.dtype = tuple(names), device, dtype
        self._sources: dict[str, ModelSource] = {}
        self._lock = Lock()

    def read(self, image: Image | None, names: Sequence[str], scaling: str = STOCK) -> str:
        """The page of a picture: one series per model, and one more for each whose RoPE is scaled.

        Args:
            image: a picture of any size and mode.
            names: of the models.
            scaling: how to scale the RoPE of those that have one, see ``RopeScaling.from_any``; ``stock``: not at all.

        Returns:
            A self-contained page.

        Raises:
            ValueError: there is no picture or no model, or no model can be scaled that way.
        """
        picture = _checked(image)
        series = []
        with self._lock:
            for source, rope, scaled in self._variants(names, scaling):
                with scaled:
                    label = Path(source.name).name + ("" if rope == STOCK else f", RoPE {rope}")
                    series.append(source.read(picture, name=label))
        note = "; ".join(f"{item.name}: {len(item.geometry)} visual tokens" for item in series)
        return render_page(series, picture, "What the model sees, as words", note)

    def ask(
        self, image: Image | None, question: str, names: Sequence[str], compression: str, scaling: str = STOCK
    ) -> list[Reply]:
        """Answers from all and from fewer visual tokens, with the stock and the scaled RoPE.

        Args:
            image: a picture of any size and mode.
            question: about it.
            names: of the models.
            compression: what ``CompressionConfig.from_any`` takes; ``none``: all tokens alone.
            scaling: as in ``read``.

        Raises:
            ValueError: something is missing or unknown.
        """
        from dualstream.modeling import CompressionConfig
        from dualstream.processing import answer_questions

        picture = _checked(image)
        question = (question or "").strip()
        if not question or len(question) > MAX_QUESTION:
            raise ValueError(f"question must have 1 to {MAX_QUESTION} letters, got {len(question)}.")
        config = CompressionConfig.from_any(compression)
        prompts: list[tuple[str, Any]] = [(FULL, None), (compression, config)][: 1 if config.method == "none" else 2]
        replies = []
        with self._lock:
            for source, rope, scaled in self._variants(names, scaling):
                with scaled:
                    for prompt, chosen in prompts:
                        (answer,) = answer_questions(
                            source.lenses.model,
                            source.processor,
                            [picture],
                            [question],
                            compression=chosen,
                            max_new_tokens=NEW_TOKENS,
                        )
                        counts = answer.kept_tokens, answer.visual_tokens
                        replies.append(Reply(source.name, rope, prompt, answer.text, *counts))
        return replies

    def _source(self, name: str) -> ModelSource:
        if name not in self.names:
            raise ValueError(f"model {name!r} is not served here; choose among {', '.join(self.names)}.")
        if name not in self._sources:
            from dualstream.modeling import load_model
            from dualstream.processing import register_processors

            register_processors()
            model, processor = load_model(name, device=self.device, dtype=self.dtype)
            self._sources[name] = ModelSource(model, processor, name, [])
        return self._sources[name]

    def _variants(self, names: Sequence[str], scaling: str) -> Iterator[tuple[ModelSource, str, Any]]:
        """Model, name of its RoPE, and the context in which it has that."""
        from dualstream.modeling import rope_scaled

        if not names:
            raise ValueError("choose at least one model.")
        sources = [self._source(name) for name in names]
        scaling = (scaling or STOCK).strip()
        scalable = [source for source in sources if _has_rope(source.lenses.model)]
        if scaling != STOCK and not scalable:
            raise ValueError(
                f"RoPE scaling {scaling!r}: {' and '.join(names)} has no rotary vision tower; choose a Qwen-VL model "
                f"such as tiny-qwen2-vl, or the scaling '{STOCK}'."
            )
        for source in sources:
            yield source, STOCK, rope_scaled(source.lenses.model, None) if source in scalable else nullcontext()
            if scaling != STOCK and source in scalable:
                yield source, scaling, rope_scaled(source.lenses.model, scaling)


def framed(page: str) -> str:
    """A page inside another one: scripts run, but it can reach neither the page around it nor the network."""
    return (
        f'<iframe title="The picture as words" sandbox="allow-scripts" srcdoc="{html.escape(page, quote=True)}" '
        f'style="width:100%;height:{FRAME_HEIGHT}px;border:0;border-radius:10px"></iframe>'
    )


def _checked(image: Image | None) -> Image:
    """The picture as 8-bit RGB."""
    from dualstream.processing import load_image

    if image is None:
        raise ValueError("there is no picture yet: upload one, or draw a scene.")
    return load_image(image)


def _has_rope(model: Any) -> bool:
    from dualstream.modeling.rope_towers import vision_rotaries

    try:
        return bool(vision_rotaries(model))
    except ValueError:
        return False
