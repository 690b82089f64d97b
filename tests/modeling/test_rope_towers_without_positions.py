"""Towers whose rotary module is given no positions (Llama 4, DINOv3): the scaled rotation by hand."""

import math

import pytest
import torch
from rotary_towers import tower

from dualstream.modeling import RopeScaling, apply_rope_scaling, rope_scaled
from dualstream.modeling.rope_towers import stock_frequencies, vision_rotaries

torch.set_num_threads(1)


@pytest.mark.parametrize("axes", ["both", "h", "w"])
def test_llama4_table_by_hand(axes):
    model = tower("Llama4VisionRotaryEmbedding")
    side, count, base = 6, 4, model.config.rope_parameters["rope_theta"]
    with rope_scaled(model, RopeScaling("poly", alpha=99, p=4, axes=axes)):
        table = model.rotary_embedding.freqs_ci.clone()
    learned = RopeScaling("table", alpha=99, p=4, learned=True, axes=axes)
    with rope_scaled(model, learned), torch.no_grad():
        torch.testing.assert_close(model.rotary_embedding(torch.empty(0)), table, rtol=0, atol=1e-4)
    assert table.shape == model.rotary_embedding.freqs_ci.shape == (side * side + 1, 1, 2 * count)
    for patch in range(side * side):
        for channel in range(2 * count):
            i, axis = channel % count, "w" if channel < count else "h"
            position = (patch % side if axis == "w" else patch // side) + 1
            g = 1 + 99 * (i / count) ** 4 if axes in ("both", axis) else 1
            angle = position * base ** -(i / count) * g
            value = complex(table[patch, 0, channel])
            assert value == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=2e-5)
    assert torch.equal(table[-1], torch.ones_like(table[-1]))


def test_llama4_stock_table_is_reproduced():
    """With factors of one on one axis and another scaled by nearly nothing, the table is the stock one."""
    model = tower("Llama4VisionRotaryEmbedding")
    stock = model.rotary_embedding.freqs_ci.clone()
    with rope_scaled(model, RopeScaling("table", values=[1.0, 1.0, 1.0, 1 + 1e-12])):
        torch.testing.assert_close(model.rotary_embedding.freqs_ci, stock, rtol=0, atol=1e-6)


def test_llama4_keeps_its_rotations_when_cast():
    model = tower("Llama4VisionRotaryEmbedding")
    with rope_scaled(model.rotary_embedding, "poly:99:4"):
        before = model.rotary_embedding.freqs_ci.clone()
        model.rotary_embedding.half()
        assert torch.equal(model.rotary_embedding.freqs_ci, before)
    model.rotary_embedding.freqs_ci = model.rotary_embedding._compute_freqs_ci(model.config)


def test_dinov3_rotation_by_hand():
    model = tower("DINOv3ViTRopePositionEmbedding")
    (rotary,) = vision_rotaries(model).values()
    count = len(stock_frequencies(rotary))
    with rope_scaled(model, "poly:99:4"), torch.no_grad():
        cos, _ = rotary(torch.empty(1, 3, 16, 24))
    centres = [((2 * i + 1) / 4 - 1, (2 * j + 1) / 6 - 1) for i in range(4) for j in range(6)]
    theta = [model.config.rope_theta ** -(i / count) * (1 + 99 * (i / count) ** 4) for i in range(count)]
    expected = [[math.cos(2 * math.pi * c * t) for _ in range(2) for c in pair for t in theta] for pair in centres]
    torch.testing.assert_close(cos, torch.tensor(expected), rtol=0, atol=2e-5)
    for axes in ("h", "w"):
        with pytest.raises(ValueError, match="DINOv3 tower shares its frequencies"):
            apply_rope_scaling(model, RopeScaling(axes=axes))
