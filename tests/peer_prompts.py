"""Toy models and prompts that tests of peers share."""

import torch

from dualstream.benchmarks.shapes import SHAPES, build_model
from dualstream.benchmarks.workload import make_inputs

TOYS = [name for name, shape in SHAPES.items() if shape.is_toy]
SMALL = {
    "tiny-qwen2-vl": (112, 168),
    "tiny-qwen2.5-vl": (168, 140),
    "tiny-qwen3-vl": (128, 192),
    "tiny-internvl": (448, 448),
}


def opened(name, **options):
    """A model whose attention is peaked, and different pictures."""
    model = build_model(name, layers=4, vision_layers=3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    inputs = make_inputs(model, SMALL.get(name, SHAPES[name].image_size), text_tokens=7, **options)
    pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(1))
    return model, {**inputs, "pixel_values": pixels}
