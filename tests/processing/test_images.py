"""Every kind of picture opens as upright 8-bit RGB, every broken one as a clear error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from dualstream.processing.images import load_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colour(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    return image.getpixel((x, y))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "LAB", "HSV", "I", "F", "I;16", "I;16B"])  # fmt: skip
@pytest.mark.parametrize("size", [(5, 3), (1, 1), (1, 300), (300, 2)])
def test_every_mode_and_size_becomes_rgb(mode: str, size: tuple[int, int]) -> None:
    image = load_image(Image.new(mode, size))
    assert image.mode == "RGB"
    assert max(image.size) <= 100 * min(image.size) and image.size >= size


def test_transparency_lies_on_the_background() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    image = load_image(encoded(clear))
    assert colour(image) == (255, 255, 255)
    assert colour(image, 1)[0] == 255 and abs(colour(image, 1)[1] - 127) <= 1
    assert colour(load_image(clear, background=(0, 0, 9))) == (0, 0, 9)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    image = load_image(encoded(palette, transparency=0))
    assert (colour(image), colour(image, 1)) == ((255, 255, 255), (40, 50, 60))
    assert colour(load_image(encoded(Image.new("LA", (1, 1), (9, 0))))) == (255, 255, 255)


def test_deep_pixels_are_scaled_not_clipped() -> None:
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(deep)))
    assert [colour(image, x)[0] for x in range(4)] == [0, 1, 128, 255]
    long = Image.fromarray(np.array([[0, 2**31 - 1]], dtype=np.int32))
    assert [colour(load_image(long), x)[0] for x in range(2)] == [0, 127]
    fractions = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [colour(load_image(fractions), x)[0] for x in range(3)] == [0, 128, 255]
    wide = Image.fromarray(np.array([[-10.0, np.nan, 10.0]], dtype=np.float32))
    assert [colour(load_image(wide), x)[0] for x in range(3)] == [0, 128, 255]
    eight = Image.fromarray(np.array([[0.0, 7.0, 200.0]], dtype=np.float32))
    assert [colour(load_image(eight), x)[0] for x in range(3)] == [0, 7, 200]


def test_the_camera_rotation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (2, 4)


def test_cmyk_grey_and_the_first_frame_of_an_animation() -> None:
    assert colour(load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))[0] > 240
    assert colour(load_image(encoded(Image.new("1", (3, 3), 1)))) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), name) for name in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(load_image(animation)) == (255, 0, 0)


def test_long_pictures_are_padded_right_or_bottom() -> None:
    image = load_image(Image.new("RGB", (1, 2000), "black"))
    assert image.size == (20, 2000)
    assert (colour(image, 0, 1999), colour(image, 1, 0)) == ((0, 0, 0), (255, 255, 255))
    assert load_image(Image.new("RGB", (2001, 3)), max_aspect=200).size == (2001, 11)
    assert load_image(Image.new("RGB", (300, 3))).size == (300, 3)
    with pytest.raises(ValueError, match=r"2000000x1 pixels.*too long and thin"):
        load_image(Image.new("RGB", (2_000_000, 1)))
    with pytest.raises(ValueError, match="max_aspect must be at least 1"):
        load_image(Image.new("RGB", (3, 3)), max_aspect=0.5)


def test_paths_bytes_streams_and_images_agree_and_stay_as_they_were(tmp_path) -> None:
    original = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 7, 3), dtype=np.uint8))
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(original))
    stream = io.BytesIO(path.read_bytes())
    for source in (path, str(path), path.read_bytes(), stream, original):
        assert load_image(source).tobytes() == original.tobytes()
    assert not stream.closed
    copy = load_image(original)
    copy.putpixel((0, 0), (1, 2, 3))
    assert copy is not original and colour(original) != (1, 2, 3)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_damaged_files_are_named(tmp_path, monkeypatch, kind: str, lenient: bool) -> None:
    """Also where another library has asked Pillow to fill what a cut file lacks."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), kind)
    for cut in (len(whole) // 2, len(whole) // 8, 10):
        path = tmp_path / f"cut{cut}.img"
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"cut{cut}\.img.*give a PNG"):
            load_image(path)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
    flipped = bytearray(whole)
    for place in rng.integers(20, len(whole), 40):
        flipped[place] ^= 0xFF
    try:  # a decoder may accept this; any failure must be the documented one
        load_image(bytes(flipped))
    except ValueError as error:
        assert "give a PNG" in str(error)


def test_wrong_sources_are_named(tmp_path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    for source, message in [
        (text, r"notes\.txt' is not a picture"),
        (empty, r"empty\.png' is not a picture"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent.png", r"absent\.png' does not exist"),
        ("https://example.org/a.png", "is a URL"),
        (b"plain bytes", "the given 11 bytes is not a picture"),
        (3, "got int"),
        (Image.new("RGB", (0, 4)), r"is empty \(0x4 pixels\)"),
        ("a\0b", "cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_image(source)


def test_decompression_bombs_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(encoded(Image.new("L", (14, 14)))).size == (14, 14)
    with pytest.raises(ValueError, match="too large to open safely"):
        load_image(encoded(Image.new("L", (15, 15))))
