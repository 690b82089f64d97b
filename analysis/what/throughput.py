"""All depths in one vision pass against a full forward per depth: time in turn in one process, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.eval.statistics import bootstrap_mean
from dualstream.measuring import count_work
from dualstream.modeling.families import family_of
from dualstream.modeling.vision_depths import visit_vision_depths
from dualstream.processing import build_inputs
from dualstream.processing.inference import READING_PROMPT

from .depth_maps import Step
from .reading import batches, visit_steps
from .scoring import Lenses

if TYPE_CHECKING:
    from PIL.Image import Image

MIB = 2**20
ONE_PASS, SLOW = "one pass, whole language model", "a full forward per depth"


def measure(
    lenses: Lenses, processor: Any, images: Sequence[Image], batch_size: int = 8, rounds: int = 5
) -> dict[str, Any]:
    """Time both ways on the same batches, in turn, and measure memory.

    Both read every vision depth after all blocks of the language model, with the final norm; the fast way also after
    half of them, which the slow way gets no cheaper. The slow way is the obvious one: per depth, the tower is run up
    to there and the stock model over the whole prompt, with its hidden states and logits. Inputs are prepared
    beforehand. On a CPU time is CPU time of this process, on an accelerator it is wall time.

    Returns:
        ``ways`` (name -> images per second, seconds per picture and speed-up over the slow way, paired, with intervals
        over batches and rounds), ``same_words`` (share of cells on which fast and slow way agree), ``memory`` (peak by
        number of depths).
    """
    model = lenses.model
    layers, blocks = (len(part(model)) for part in (family_of(model).llm_blocks, family_of(model).vision_blocks))
    prepared = [reading_inputs(model, processor, batch) for batch in batches(images, batch_size)]
    depths = list(range(blocks + 1))
    ways = {
        ONE_PASS: (read_in_one_pass, layers),
        "one pass, half of the language model": (read_in_one_pass, layers // 2),
        SLOW: (read_by_full_forwards, layers),
    }
    for read, depth in ways.values():
        read(lenses, prepared[0], depths[-1:], depth)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same = []
    for _ in range(rounds):
        for inputs in prepared:
            words = {}
            for name, (read, depth) in ways.items():
                started = _clock(model)
                words[name] = read(lenses, inputs, depths, depth)
                seconds[name].append((_clock(model) - started) / len(inputs["input_ids"]))
            one, other = words[ONE_PASS], words[SLOW]
            same.append(float(np.mean([float((one[d] == other[d]).float().mean()) for d in depths])))
    slow = np.array(seconds[SLOW])
    return {
        "images": len(images),
        "rounds": rounds,
        "batch_size": batch_size,
        "depths": len(depths),
        "clock": "CPU seconds of the process" if model.device.type == "cpu" else "wall seconds",
        "ways": {
            name: {
                "images_per_second": float(1 / np.mean(values)),
                "seconds": bootstrap_mean(np.array(values)),
                "speedup": bootstrap_mean(slow / np.array(values)),
            }
            for name, values in seconds.items()
        },
        "same_words": float(np.mean(same)),
        "memory": [
            {"depths": count, "peak_mib": peak_memory(lenses, prepared[0], depths[-count:], layers) / MIB}
            for count in sorted({1, 2, (len(depths) + 1) // 2, len(depths)})
        ],
    }


def peak_memory(lenses: Lenses, inputs: Any, depths: Sequence[int], llm_depth: int) -> int:
    """Peak of bytes in live tensors that a reading makes beyond weights and inputs."""
    return count_work(lambda: read_in_one_pass(lenses, inputs, depths, llm_depth), flops=False).peak_bytes


def reading_inputs(model: Any, processor: Any, images: Sequence[Image]) -> Any:
    """A batch on the model's device, every image with the prompt that readings are made with."""
    inputs = build_inputs(processor, list(images), [READING_PROMPT] * len(images))
    inputs.pop("compression", None)
    return inputs.to(model.device)


def _clock(model: Any) -> float:
    if model.device.type == "cpu":
        return time.process_time()
    torch.get_device_module(model.device).synchronize()
    return time.perf_counter()


def read_in_one_pass(lenses: Lenses, inputs: Any, depths: Sequence[int], llm_depth: int) -> dict[int, torch.Tensor]:
    """The best word of every cell after several vision depths, by one pass of the tower: depth -> ids (N,)."""
    found: dict[int, torch.Tensor] = {}

    def read(step: Step, states: torch.Tensor) -> None:
        found[step.vision_depth] = lenses.read(states, step).ids[:, 0]

    visit_steps(lenses.model, inputs, [Step(j, llm_depth) for j in depths], read)
    return found


class _Enough(Exception):
    """Ends a pass of the tower."""


@torch.no_grad()
def read_by_full_forwards(lenses: Lenses, inputs: Any, depths: Sequence[int], _: int) -> dict[int, torch.Tensor]:
    """The same by the stock model on the whole prompt, a tower and a forward pass per depth."""
    model, found = lenses.model, {}
    image = inputs["input_ids"] == family_of(model).image_token_id(model.config)
    for depth in depths:
        encoded: list[Any] = []

        def stop(_: int, __: torch.Tensor, output: Any, encoded: list[Any] = encoded) -> None:
            encoded.append(output)
            raise _Enough

        with suppress(_Enough):
            visit_vision_depths(model, inputs, [depth], stop)
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        output = model(**rest, mm_encoder_outputs={"image": encoded[0]}, output_hidden_states=True, use_cache=False)
        log_probs = output.logits.float().log_softmax(-1)
        found[depth] = log_probs.topk(lenses.top_k).indices[image][:, 0].int().cpu()
    return found
