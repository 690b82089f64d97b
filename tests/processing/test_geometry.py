"""Geometry against the real processors: what a token's pixels really show, measured through `pixel_values`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dualstream.processing.geometry import token_geometry
from dualstream.processing.images import load_image

# (family, image-processor settings, call arguments)
CASES = {
    "llava": ("llava", {}, {}),
    "llava-336/14": ("llava", {"edge": 336, "patch_size": 14}, {}),
    "llava-square": ("llava", {"do_pad": True}, {}),
    "llava-squash": ("llava", {"size": {"height": 48, "width": 48}, "do_center_crop": False}, {}),
    "llava-padded-crop": ("llava", {"size": {"shortest_edge": 45}, "patch_size": 16}, {}),
    "qwen2_vl": ("qwen2_vl", {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}}, {}),
    "qwen2_vl-6": ("qwen2_vl", {"patch_size": 6, "size": {"shortest_edge": 400, "longest_edge": 9000}}, {}),
    "qwen2_5_vl-7": ("qwen2_5_vl", {"patch_size": 7, "size": {"shortest_edge": 784, "longest_edge": 20000}}, {}),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {},
        {"images_kwargs": {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 90}}},
    ),
    "qwen3_vl": ("qwen3_vl", {"size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 80}}, {}),
    "internvl": ("internvl", {}, {}),
    "internvl-448": (
        "internvl",
        {"size": {"height": 448, "width": 448}, "image_seq_length": 256},
        {"max_patches": 4},
    ),
    "internvl-one-tile": ("internvl", {}, {"crop_to_patches": False}),
    "internvl-min-patches": ("internvl", {"min_patches": 3}, {"images_kwargs": {"max_patches": 6}}),
}
SIZES = [
    (64, 64), (336, 336), (640, 480), (480, 640), (333, 500), (1, 1), (7, 9), (28, 28), (29, 57), (1, 2000),
    (600, 31), (100, 1), (224, 225), (97, 89), (800, 150), (150, 450), (65, 63), (320, 200), (513, 511), (45, 44),
]  # fmt: skip


def pixels_per_token(processor, image: Image.Image, **kwargs) -> np.ndarray:
    """(N, pixels, 3): the processed pixels behind every visual token, by the layout the real models read."""
    image_token = processor.image_token
    batch = processor(images=[image], text=[f"{image_token} what"], return_tensors="pt", **kwargs)
    values = batch["pixel_values"].numpy()
    placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
    if values.ndim == 2:  # Qwen: (patches, channel * time * patch * patch), merge² consecutive patches per token
        merge, patch = processor.image_processor.merge_size, processor.image_processor.patch_size
        values = values.reshape(-1, merge**2, 3, 2, patch * patch)[:, :, :, 0]
        tokens = values.transpose(0, 1, 3, 2).reshape(len(values), -1, 3)
    else:
        side = getattr(processor, "patch_size", None)
        side = side or values.shape[-1] // int(processor.image_seq_length**0.5)
        count, channels, height, width = values.shape
        rows, cols = height // side, width // side
        values = values[:, :, : rows * side, : cols * side].reshape(count, channels, rows, side, cols, side)
        tokens = values.transpose(0, 2, 4, 3, 5, 1).reshape(count * rows * cols, side * side, channels)
    assert len(tokens) == placeholders
    return tokens


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row, blue is full everywhere: padding shows as black."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)[None, :]
    picture[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    picture[..., 2] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("case", CASES)
def test_every_token_shows_its_rectangle(make_processor, case: str, backend: str) -> None:
    family, settings, call = CASES[case]
    processor = make_processor(family, backend, do_rescale=False, do_normalize=False, **settings)
    for size in SIZES:
        width, height = load_image(Image.new("RGB", size)).size
        geometry = token_geometry(processor, (width, height), **call)
        tokens = pixels_per_token(processor, ramp(width, height), **call)
        assert len(geometry) == len(tokens), size
        mean = tokens.mean(axis=1)
        seen = mean[:, 2] > 254.5  # tokens with no pixel of padding
        assert (geometry.areas[seen] > 0).all(), size
        boxes = geometry.boxes[seen]
        block = np.array([(b.cell_width, b.cell_height) for b in geometry.blocks])[geometry.places[seen, 0]]
        centre = np.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], axis=1) / 2
        shown = mean[seen, :2] / 255 * (width, height)
        # resizing keeps a ramp, but for the picture's border (the kernel is cut off) and the rounding to 8 bits
        reach = 2.5 + 0.3 * block
        inner = (boxes[:, :2] > reach).all(axis=1) & (boxes[:, 2:] < (width, height) - reach).all(axis=1)
        slack = np.where(inner, 0.01, 0.12)[:, None] * block + 0.8 / 255 * np.array([width, height])
        slack += np.where(inner, 0.05, 0.51)[:, None]
        assert (np.abs(shown - centre) <= slack).all(), (size, np.abs(shown - centre).max(0))
        padding = mean[:, 2] < 0.5
        assert (geometry.areas[padding] < 1e-9 + geometry.areas.max() * 0.2).all(), size


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("internvl-448", "llava-336/14")])
def test_painting_a_cell_changes_its_token_most(make_processor, case: str, backend: str) -> None:
    family, settings, call = CASES[case]
    processor = make_processor(family, backend, **settings)
    rng = np.random.default_rng(0)
    painted = 0
    for size in SIZES:
        width, height = load_image(Image.new("RGB", size)).size
        base = rng.integers(80, 120, size=(height, width, 3), dtype=np.uint8)
        geometry = token_geometry(processor, (width, height), **call)
        before = pixels_per_token(processor, Image.fromarray(base), **call)
        for token in rng.permutation(len(geometry))[:3]:
            left, top = np.ceil(geometry.boxes[token, :2] - 1e-9).astype(int)
            right, bottom = np.floor(geometry.boxes[token, 2:] + 1e-9).astype(int)
            whole_pixels = max(right - left, 0) * max(bottom - top, 0)
            if whole_pixels < 0.5 * geometry.areas[token] or geometry.areas[token] == 0:
                continue  # the picture is enlarged: no pixel belongs to this token alone
            changed = base.copy()
            changed[top:bottom, left:right] = 255
            after = pixels_per_token(processor, Image.fromarray(changed), **call)
            change = ((after - before) ** 2).sum(axis=(1, 2))
            rivals = geometry.is_thumbnail == geometry.is_thumbnail[token]  # a thumbnail repeats what the tiles show
            assert change[token] == change[rivals].max(), (size, token)
            painted += 1
    assert painted >= 20


def test_qwen_min_and_max_pixels_of_the_real_checkpoints(make_processor) -> None:
    size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    processor = make_processor("qwen2_5_vl", size=size)
    geometry = token_geometry(processor, (1280, 960))
    assert geometry.grids == [(30, 41)]  # the worked example of the specification: 41 x 30 tokens
    assert np.allclose(geometry.blocks[0].cell_width, 28 * 1280 / 1148)


def test_internvl_tiles_of_the_real_checkpoints(make_processor) -> None:
    processor = make_processor("internvl", size={"height": 448, "width": 448}, image_seq_length=256)
    geometry = token_geometry(processor, (1280, 960))
    assert len(geometry) == (12 + 1) * 256
    assert geometry.grids == [(16, 16)] * 13
    assert geometry.is_thumbnail.sum() == 256
    tile, row, col = 5, 3, 7  # tiles are counted row by row on the 4 x 3 canvas
    token = tile * 256 + row * 16 + col
    assert np.allclose(geometry.boxes[token, :2], [320 * 1 + 20 * col, 320 * 1 + 20 * row])


def test_unknown_processors_and_sizes_are_refused(make_processor) -> None:
    with pytest.raises(ValueError, match="supported family"):
        token_geometry(object(), (10, 10))
    with pytest.raises(ValueError, match="image_size"):
        token_geometry(make_processor("llava"), (0, 10))
    next_processor = make_processor("llava")
    next_processor.image_processor.image_grid_pinpoints = [[64, 128]]  # LLaVA-NeXT cuts tiles of its own
    with pytest.raises(ValueError, match="supported family"):
        token_geometry(next_processor, (10, 10))
    processor = make_processor("internvl", image_seq_length=15)
    with pytest.raises(ValueError, match="image_seq_length"):
        token_geometry(processor, (10, 10))
    processor = make_processor("llava", size={"shortest_edge": 64, "longest_edge": 100})
    with pytest.raises(ValueError, match="shortest_edge alone"):
        token_geometry(processor, (10, 10))
