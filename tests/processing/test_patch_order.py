"""Patch orders against the processors' and the Qwen2.5-VL tower's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualstream.processing.patch_order import (
    inverse,
    merge_block_order,
    places_of_tokens,
    window_order,
    window_token_order,
)

tokens_per_side = st.integers(1, 13)


@settings(max_examples=50, deadline=None)
@given(tokens_per_side, tokens_per_side, st.integers(1, 3))
def test_merge_block_order_follows_the_published_formula(token_rows: int, token_cols: int, merge: int) -> None:
    rows, cols = token_rows * merge, token_cols * merge
    place = inverse(merge_block_order(rows, cols, merge))
    for r in range(rows):
        for c in range(cols):
            group = (r // merge) * token_cols + c // merge
            assert place[r * cols + c] == group * merge**2 + (r % merge) * merge + c % merge


@settings(max_examples=60, deadline=None)
@given(tokens_per_side, tokens_per_side, st.integers(1, 3), st.integers(1, 6), st.sampled_from([6, 7, 14]))
def test_window_order_is_the_models_own(rows: int, cols: int, merge: int, window: int, patch: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([[1, rows * merge, cols * merge]])
    expected, _ = get_vision_window_index(grid, merge, window * merge * patch, patch)
    assert window_token_order(rows, cols, window).tolist() == expected.tolist()
    patches = merge_block_order(rows * merge, cols * merge, merge).reshape(-1, merge**2)[expected.numpy()]
    order = window_order(rows * merge, cols * merge, merge, window * merge)
    assert order.tolist() == patches.reshape(-1).tolist()
    assert sorted(order.tolist()) == list(range(len(order)))
    assert (inverse(order)[order] == np.arange(len(order))).all()


def test_the_tower_of_qwen2_5_holds_its_patches_in_window_order() -> None:
    """What enters the tower's first block is the patch embedding, permuted."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=7, window_size=56, out_hidden_size=16
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    seen: dict[str, torch.Tensor] = {}
    tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(inside=args[0]))
    tower.patch_embed.register_forward_hook(lambda _, __, output: seen.update(embedded=output))
    rows, cols = 12, 22
    tower(torch.randn(rows * cols, 3 * 2 * 7 * 7), grid_thw=torch.tensor([[1, rows, cols]]))
    raster = seen["embedded"][inverse(merge_block_order(rows, cols, 2))]
    assert torch.equal(seen["inside"].reshape_as(raster), raster[window_order(rows, cols, 2, 56 // 7)])


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("merge", [2, 3])
def test_the_processor_emits_merge_blocks(make_processor, backend: str, merge: int) -> None:
    """Every patch of the picture has its own grey value, which must come out in the stated order."""
    processor = make_processor(
        "qwen2_vl", backend, patch_size=6, merge_size=merge, do_normalize=False, do_rescale=False,
        size={"shortest_edge": 1, "longest_edge": 10**6},
    )  # fmt: skip
    rows, cols = 2 * merge, 4 * merge
    greys = np.arange(rows * cols, dtype=np.uint8).reshape(rows, cols)
    picture = Image.fromarray(np.kron(greys, np.ones((6, 6), dtype=np.uint8))).convert("RGB")
    values = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert values.float().mean(dim=1).round().long().tolist() == merge_block_order(rows, cols, merge).tolist()


@settings(max_examples=40, deadline=None)
@given(tokens_per_side, tokens_per_side, st.integers(1, 3), st.booleans(), st.data())
def test_places_of_tokens_are_the_patches_that_merge_into_them(rows, cols, merge, windowed, data) -> None:
    grid = (rows * merge, cols * merge)
    order = window_order(*grid, merge, 4 * merge) if windowed else merge_block_order(*grid, merge)
    token = data.draw(st.integers(0, rows * cols - 1))
    patches = order[places_of_tokens(np.array([token]), *grid, merge, order)[0]]
    token_of_patch = (patches // grid[1] // merge) * cols + patches % grid[1] // merge
    assert set(token_of_patch.tolist()) == {token} and len(set(patches.tolist())) == merge**2


def test_grids_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5x4 patch grid does not divide into 2x2"):
        merge_block_order(5, 4, 2)
    with pytest.raises(ValueError, match="window must hold"):
        window_order(4, 4, 2, window=1)
