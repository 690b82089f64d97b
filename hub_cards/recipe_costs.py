"""Estimates of what the recipes cost, from the sizes of the architectures alone: nothing here was measured.

    python -m dualstream.hub_cards.recipe_costs qwen2.5-vl-7b

Counted are matrix products. A training step of LoRA costs the forward pass, the gradient of the activations (as much
again) and recomputed activations (as much again); a distillation step runs the teacher forward only, since no gradient
enters the language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dualstream.eval.decoder_costs import (
    BYTES_PER_NUMBER,
    decoder_cost,
    largest_pruned,
    llava_1_5_7b,
    llm_token_multiply_adds,
    qwen2_5_vl_7b,
    qwen2_vl_2b,
)
from dualstream.eval.result_tables import markdown_table

FLOPS = 1e14  # 100 TFLOP/s in bfloat16: a third of what one 80 GB card of 2020 can do at most
PROMPT_WORDS = 60  # tokens of a question with its chat template
ANSWER = 20
LORA_FACTOR = 4  # forward, activation gradients, recomputed forward, LoRA's own matrices rounded up


@dataclass(frozen=True)
class Workload:
    """What a recipe does to one architecture.

    Attributes:
        config: makes the configuration.
        visual_tokens: of a picture as the recipe prepares it.
        patches: that the vision tower sees of it.
        vision_parameters: of the matrices that every patch goes through.
        distilled_images: pictures times epochs of the distillation.
        tuned_rows: rows times epochs of the fine-tuning, 0 without.
    """

    config: Callable[[], Any]
    visual_tokens: int
    patches: int
    vision_parameters: int
    distilled_images: int
    tuned_rows: int = 0


WORKLOADS = {
    "llava-1.5-7b": Workload(llava_1_5_7b, 576, 577, 24 * 12 * 1024**2, 2 * 100_000),
    "qwen2-vl-2b": Workload(qwen2_vl_2b, 1024, 4096, 32 * 12 * 1280**2, 100_000),
    "qwen2.5-vl-7b": Workload(qwen2_5_vl_7b, 1024, 4096, 32 * (4 * 1280**2 + 3 * 1280 * 3420), 100_000, 40_000),
}


def rows(name: str) -> list[tuple[str, str]]:
    """Item and estimate, for one recipe.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in WORKLOADS:
        raise ValueError(f"{name!r} is no recipe; accepted are {', '.join(WORKLOADS)}.")
    work = WORKLOADS[name]
    config = work.config()
    prompt = work.visual_tokens + PROMPT_WORDS
    forward = 2 * (work.patches * work.vision_parameters + prompt * llm_token_multiply_adds(config, (prompt + 1) // 2))
    text = config.get_text_config()
    classes = largest_pruned(config)
    linear = decoder_cost("linear", text.vocab_size, text.hidden_size)
    pruned = decoder_cost("pruned", text.vocab_size, text.hidden_size, classes)
    memory = BYTES_PER_NUMBER * parameters(config)
    hours = work.distilled_images * forward / FLOPS / 3600
    found = [
        ("weights in bfloat16", f"{memory / 1e9:.1f} GB"),
        ("one picture read, forward pass", f"{forward / 1e12:.1f} TFLOP, {work.visual_tokens} visual tokens"),
        ("linear decoder", f"{linear.megabytes:,.0f} MB, {_share(linear, config)} of an LLM token per visual token"),
        (
            f"pruned decoder, {classes:,} readings",
            f"{pruned.megabytes:,.0f} MB, {_share(pruned, config)} of an LLM token per visual token",
        ),
        (f"distillation, {work.distilled_images:,} pictures", f"{hours:.0f} h on one card"),
    ]
    if work.tuned_rows:
        tuning = work.tuned_rows * LORA_FACTOR * forward / FLOPS / 3600
        found.append((f"LoRA, {work.tuned_rows:,} rows", f"{tuning:.0f} h on one card"))
    answer = forward + 2 * ANSWER * llm_token_multiply_adds(config, prompt)
    found.append(("1,000 questions, one arm", f"{1000 * answer / FLOPS / 60:.0f} min on one card, more where short"
                  " answers keep it waiting for memory"))  # fmt: skip
    return found


def parameters(config: Any) -> int:
    """All parameters of a model, counted on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def table(name: str) -> str:
    """The estimates as Markdown."""
    return markdown_table(("estimate, not measured", f"at {FLOPS / 1e12:.0f} TFLOP/s"), rows(name))


def _share(cost: Any, config: Any) -> str:
    return f"{100 * cost.multiply_adds / llm_token_multiply_adds(config):.1f} %"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dualstream.hub_cards.recipe_costs")
    parser.add_argument("recipe", choices=sorted(WORKLOADS))
    print(table(parser.parse_args().recipe))


if __name__ == "__main__":
    main()
