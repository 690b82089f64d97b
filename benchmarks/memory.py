"""How many rows fit: bytes of every stage in closed form, and the largest batch at fixed memory.

A stage holds what lives at its peak: ``vision`` a block of the tower, ``reading`` the scores of the visual decoder,
``prefill`` the feed-forward of the last block beside all keys and values, ``decoding`` all keys and values at the end
of the answer. The formulas follow the code of transformers with fused attention (SDPA or Flash; eager attention holds
a matrix of scores more) and count tensors as ``measuring.peak_bytes`` does; ``check`` compares them with measured
peaks. Workspaces of kernels, the context of an accelerator and fragments between blocks are not counted: a reserve is
held back for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualstream.eval.decoder_costs import decoder_cost, decoder_sizes, largest_pruned
from dualstream.eval.prompt_costs import kv_bytes_per_token
from dualstream.measuring import peak_bytes
from dualstream.modeling.families import family_of
from dualstream.modeling.vocabulary_scores import CHUNK, CPU_HALVES_CHUNK

from .closed_form import Tower, tower_of, weight_bytes
from .forced_map import build_decoder, kept_cells
from .prefill import FULL, OURS, compressed, uncompressed
from .shapes import build_model, shape_named
from .workload import make_inputs

SUITE = "memory"
GIB = 2**30
RESERVE = 1.0  # GiB
BUDGETS = (24.0, 80.0, 141.0)  # GiB
REDUCTIONS = (0.16, 0.28, 0.32, 0.49, 0.58)
AT_ONCE, ONE_BY_ONE = "all rows at once", "one row at a time"
FLOAT32 = 4

Row = dict[str, Any]


@dataclass(frozen=True)
class Bytes:
    """Bytes that a stage needs: some in any case, and some for every row of the batch."""

    fixed: int
    per_row: int

    def of(self, batch: int) -> int:
        """Bytes for a batch."""
        return self.fixed + batch * self.per_row


@dataclass(frozen=True)
class Prompt:
    """A row of a batch: its pictures and its text.

    Attributes:
        tower: at work on one picture, see ``closed_form.tower_of``.
        images: pictures of the row.
        text_tokens: tokens that are no visual ones.
        kept: visual tokens of the row that reach the language model.
        answer_tokens: of the answer.
    """

    tower: Tower
    images: int
    text_tokens: int
    kept: int
    answer_tokens: int

    @property
    def length(self) -> int:
        """Tokens of the prompt that reach the language model."""
        return self.kept + self.text_tokens

    @property
    def cells(self) -> int:
        """Visual tokens before compression."""
        return self.images * self.tower.cells


def make_prompt(
    config: Any,
    image_size: tuple[int, int],
    images: int = 1,
    text_tokens: int = 48,
    reduction: float = 0.0,
    answer_tokens: int = 0,
) -> Prompt:
    """Describe a row as ``workload.make_inputs`` makes it, at a reduction rate (see ``forced_map.kept_cells``)."""
    tower = tower_of(config, image_size)
    delimiters = [f"vision_{end}_token_id" for end in ("start", "end")]
    around = images * sum(getattr(config, name, None) is not None for name in delimiters)
    kept = images * int(kept_cells(torch.tensor(tower.grids), reduction).sum())
    return Prompt(tower, images, text_tokens + around, kept, answer_tokens)


def stage_bytes(model: Any, prompt: Prompt, decoder: str | None = None) -> dict[str, Bytes]:
    """Bytes alive at the peak of every stage, beyond weights and inputs.

    Args:
        model: a stock model, possibly on the meta device.
        prompt: a row.
        decoder: kind that reads the visual tokens, see ``forced_map.build_decoder``; None if nothing is read.
    """
    config, size = model.config, model.dtype.itemsize
    text, tower = config.get_text_config(), prompt.tower
    vocab_size, width = decoder_sizes(config)
    head_width = getattr(text, "head_dim", None) or width // text.num_attention_heads
    kv, length, end = kv_bytes_per_token(model), prompt.length, prompt.length + prompt.answer_tokens
    name, deepstack = family_of(config).name, len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    # The stock model embeds the text before it looks and keeps the tower's states until the end; ours does neither.
    embedded = length * width * size if decoder is None else 0
    states = prompt.images * tower.tokens * tower.width * size * (2 if name == "llava" else 1)
    # Features as the encoder returns them and, unless they are one tensor, joined; deepstack has more of them.
    copies = (1 if name == "internvl" else 2) * (1 + deepstack)
    # Gate, up and their product; the stream before and after attention, normed, and as it came in; cosine and sine.
    block = (3 * text.intermediate_size + 4 * width + 2 * head_width) * size
    deep = prompt.cells * deepstack * width * size
    seeing = prompt.images * tower_bytes(config, tower, size) + deep + embedded
    answering = length * (kv + block) + prompt.kept * copies * width * size + (states if decoder is None else 0)
    stages = {
        "vision": Bytes(0, seeing),
        "prefill": Bytes(0, answering),
        # Appending to a layer's keys or values copies them; then come the scores of the next token.
        "decoding": Bytes(0, end * kv + end * kv // (2 * text.num_hidden_layers) + vocab_size * (size + FLOAT32)),
    }
    if decoder is not None:
        reading = _reading_bytes(model, prompt.cells, decoder, joined=name != "internvl")
        stages["reading"] = Bytes(reading.fixed, reading.per_row + states + deep)
    return stages


def tower_bytes(config: Any, tower: Tower, size: int) -> int:
    """Bytes alive at the peak of a block of the vision tower on one picture, for numbers of `size` bytes."""
    vision, states, name = config.vision_config, tower.width, family_of(config).name
    if name == "llava":  # CLIP: the feed-forward, with the sigmoid of its activation
        return tower.tokens * (3 * vision.intermediate_size + 4 * states) * size
    if name == "internvl":  # the feed-forward
        return tower.tokens * (2 * vision.intermediate_size + 5 * states) * size
    # Qwen: queries and keys turn in float32; beside them input, normed input, and joint queries, keys and values. What
    # is float32 already is not copied for that; then putting the windows together holds a tensor more.
    turned = 6 if size < FLOAT32 else 5
    positions = states if name == "qwen3_vl" else 0
    turning = turned * states + positions + 2 * (states // vision.num_heads)
    hidden = states * vision.mlp_ratio if name == "qwen2_vl" else vision.intermediate_size
    feed_forward = (2 if name == "qwen3_vl" else 3) * hidden + 3 * states
    return tower.tokens * max(5 * states * size + turning * FLOAT32, feed_forward * size)


def _reading_bytes(model: Any, cells: int, decoder: str, joined: bool) -> Bytes:
    """Scores of a chunk of classes, and what is multiplied.

    Float32 scores of the chunk before live on while the next are computed; a CPU has those of halves as halves first
    and lets go of them. A factored decoder transforms features in float32.
    """
    (vocab_size, width), size = decoder_sizes(model.config), model.dtype.itemsize
    classes = largest_pruned(model.config) if decoder == "pruned" else vocab_size
    on_cpu, halves = model.device.type == "cpu", size < FLOAT32 and decoder != "factored"
    chunk = min(classes, CPU_HALVES_CHUNK if on_cpu and size < FLOAT32 else CHUNK)
    beside = size if on_cpu and halves else FLOAT32 if classes > chunk else 0
    scores = chunk * (FLOAT32 + beside)
    transformed = 2 * FLOAT32 * width if decoder == "factored" else 0
    fixed = FLOAT32 * (chunk * width + width**2) if decoder == "factored" else 0
    return Bytes(fixed, cells * (scores + width * size * (2 if joined else 1) + transformed))


def largest_batch(budget: float, held: int, stages: Mapping[str, Bytes], inputs: int = 0) -> tuple[int, str]:
    """Largest batch that fits, and the stage that keeps the next row out.

    Args:
        budget: bytes in all.
        held: bytes of weights and whatever else is always there.
        stages: what each needs.
        inputs: bytes of the inputs of a row.
    """
    fits = {
        name: int((budget - held - stage.fixed) // max(stage.per_row + inputs, 1)) for name, stage in stages.items()
    }
    limit = min(fits, key=lambda name: fits[name])
    return max(fits[limit], 0), limit


def one_by_one(stages: Mapping[str, Bytes], kv_row: int) -> dict[str, Bytes]:
    """Bytes when one row at a time goes through the model up to its first token, as servers do.

    Every other row waits with the keys and values of its prompt and whole answer.

    Args:
        stages: of rows that go together.
        kv_row: bytes of keys and values of a row at the end of its answer.
    """
    alone = {name: Bytes(stage.of(1) - kv_row, kv_row) for name, stage in stages.items() if name != "decoding"}
    return {**alone, "decoding": stages["decoding"]}


def run(
    shape: str,
    image_size: tuple[int, int] | None = None,
    images: int = 1,
    text_tokens: int = 48,
    reductions: Sequence[float] = REDUCTIONS,
    decoders: Sequence[str] = ("pruned",),
    budgets: Sequence[float] = BUDGETS,
    answer_tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    checked: Any = None,
    progress: Callable[[], Any] | None = None,
) -> list[Row]:
    """Largest batches of a shape at full depth, which is never allocated, and how good the prediction is.

    Args:
        shape: one of ``shapes.SHAPES``.
        image_size: height and width in pixels; the shape's own if None.
        images: pictures of a row.
        text_tokens: tokens of text of a row.
        reductions: shares of visual tokens to remove.
        decoders: kinds, see ``forced_map.build_decoder``.
        budgets: GiB of memory.
        answer_tokens: of every answer.
        dtype: of weights, keys and values.
        checked: a model to measure peaks on, usually of reduced depth; nothing is measured if None.
        progress: called after every row of the result.

    Returns:
        Rows of kind ``largest batch`` and, if something was measured, ``check``.

    Raises:
        ValueError: the shape is unknown, or a budget or reduction is out of range.
    """
    if any(budget <= RESERVE for budget in budgets):
        raise ValueError(f"budgets={list(budgets)} must be above the reserve of {RESERVE} GiB")
    image_size = image_size or shape_named(shape).image_size
    model = build_model(shape, dtype=dtype, device="meta")
    rows = []
    for decoder, reduction in [(None, 0.0), *((kind, rate) for kind in decoders for rate in reductions)]:
        prompt = make_prompt(model.config, image_size, images, text_tokens, reduction, answer_tokens)
        rows += [_batch_row(model, prompt, decoder, reduction, budget) for budget in budgets]
    rows = [_compared(row, rows) for prefill in (AT_ONCE, ONE_BY_ONE) for row in _of_prefill(rows, prefill)]
    if checked is not None:
        reduction = sorted(reductions)[len(reductions) // 2] if reductions else 0.5
        rows += check(checked, image_size, images, text_tokens, reduction, decoders, progress=progress)
    return rows


def _batch_row(model: Any, prompt: Prompt, decoder: str | None, reduction: float, budget: float) -> Row:
    size = model.dtype.itemsize
    stages = stage_bytes(model, prompt, decoder)
    weights, read = weight_bytes(model), _decoder_bytes(model.config, decoder)
    inputs = prompt.images * prompt.tower.patches * prompt.tower.patch_values * size
    kv_row = (prompt.length + prompt.answer_tokens) * kv_bytes_per_token(model)
    available = (budget - RESERVE) * GIB
    fits = {
        AT_ONCE: largest_batch(available, weights + read, stages, inputs),
        ONE_BY_ONE: largest_batch(available, weights + read + inputs, one_by_one(stages, kv_row)),
    }
    return {
        "suite": SUITE,
        "kind": "largest batch",
        "way": FULL if decoder is None else f"{OURS}, {decoder}",
        "decoder": decoder,
        "reduction": reduction,
        "budget_gib": budget,
        "images": prompt.images,
        "visual_tokens": prompt.cells,
        "kept_tokens": prompt.kept,
        "prompt_tokens": prompt.length,
        "answer_tokens": prompt.answer_tokens,
        "weight_bytes": weights,
        "decoder_bytes": read,
        "kv_bytes": kv_row,
        "stage_bytes": {name: stage.per_row for name, stage in stages.items()},
        "fits": fits,
    }


def _decoder_bytes(config: Any, decoder: str | None) -> int:
    if decoder is None:
        return 0
    cost = decoder_cost(decoder, *decoder_sizes(config), largest_pruned(config) if decoder == "pruned" else None)
    return cost.bytes + cost.table_bytes


def _of_prefill(rows: Sequence[Row], prefill: str) -> list[Row]:
    """Take one way to prefill out of rows that hold both."""
    found = []
    for row in rows:
        batch, limit = row["fits"][prefill]
        rest = {name: value for name, value in row.items() if name != "fits"}
        found.append({**rest, "prefill": prefill, "batch": batch, "bound_by": limit})
    return found


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """Add how many times as many rows fit as without compression, None where not one fits there."""
    full = next(r for r in rows if r["decoder"] is None and r["budget_gib"] == row["budget_gib"])
    batch = full["fits"][row["prefill"]][0]
    return {**row, "ratio": row["batch"] / batch if batch else None, "ratio_to": FULL}


def check(
    model: Any,
    image_size: tuple[int, int],
    images: int = 1,
    text_tokens: int = 48,
    reduction: float = 0.49,
    decoders: Sequence[str] = ("pruned",),
    batches: Sequence[int] = (1, 2),
    progress: Callable[[], Any] | None = None,
) -> list[Row]:
    """Compare predicted with measured peaks up to the first token.

    Args:
        model: a stock model in memory.
        image_size: height and width in pixels.
        images: pictures of a row.
        text_tokens: tokens of text of a row.
        reduction: share of visual tokens to remove.
        decoders: kinds, see ``forced_map.build_decoder``.
        batches: rows of the batches.
        progress: called after every row of the result.

    Returns:
        A row per batch and way; ``error`` is predicted / measured - 1.
    """
    rows = []
    readers = {kind: build_decoder(kind, model) for kind in decoders}
    for batch in batches:
        inputs = make_inputs(model, image_size, batch, images, text_tokens)
        for kind in (None, *readers):
            rate = 0.0 if kind is None else reduction
            way = uncompressed(model, inputs) if kind is None else compressed(model, inputs, rate, readers[kind])
            prompt = make_prompt(model.config, image_size, images, text_tokens, rate)
            stages = stage_bytes(model, prompt, kind)
            predicted = {name: stages[name].of(batch) for name in stages if name != "decoding"}
            peak, measured = max(predicted.values()), peak_bytes(way, model.device)
            rows.append(
                {
                    "suite": SUITE,
                    "kind": "check",
                    "way": FULL if kind is None else f"{OURS}, {kind}",
                    "decoder": kind,
                    "reduction": rate,
                    "batch": batch,
                    "images": images,
                    "visual_tokens": prompt.cells,
                    "kept_tokens": prompt.kept,
                    "layers": model.config.get_text_config().num_hidden_layers,
                    "bound_by": max(predicted, key=lambda name: predicted[name]),
                    "predicted_bytes": peak,
                    "measured_bytes": measured,
                    "error": peak / measured - 1,
                }
            )
            if progress is not None:
                progress()
    return rows
