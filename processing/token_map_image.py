"""Draw a token map over its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .lettering import NEUTRAL, Colour, Font, Lettering, colours_of
from .token_map_text import summary
from .words import has_meaning

if TYPE_CHECKING:
    from .token_map import TokenMap

Box = tuple[float, float, float, float]

CELL_WIDTH, CELL_HEIGHT = 84, 46  # pixels per cell at which most words are legible
TINT, DIM = 0.5, 0.74  # opacity of a word's colour, and of the dark over cells that are dropped or not looked at
GREY = 0.65  # how much colour is taken from the picture, so that the words' colours look as in the legend
SMALLEST_FONT = 11
DARK: Colour = (17, 20, 26)
PAGE: Colour = (250, 250, 248)
INK: Colour = (30, 33, 40)
LEGEND_WORDS = 14
MARGIN = 16


def render_image(
    token_map: TokenMap, max_side: int = 2400, title: str = "", font: str | Path | None = None
) -> Image.Image:
    """The picture with a grid of words over it, and a legend below.

    Every cell carries its word, tinted in the word's colour: the most frequent words get the colours of a palette
    that colour-blind readers can tell apart, all others and punctuation stay grey. With compression, a run is outlined
    as one box with its word in the middle, and dropped cells are dark. A thumbnail is drawn beside its tiles.

    Args:
        token_map: a map with geometry; without a picture the words stand on plain grey.
        max_side: longest side of the drawn picture in pixels.
        title: line above the picture.
        font: path of a TrueType font, for scripts that Pillow's bundled font lacks.

    Returns:
        A new RGB image.

    Raises:
        ValueError: if the map has no geometry, or `max_side` is below 200.
    """
    if token_map.geometry is None:
        raise ValueError("the token map has no geometry; make it with token_geometry(processor, image.size).")
    if max_side < 200:
        raise ValueError(f"max_side must be at least 200 pixels, got {max_side}.")
    letters = Lettering(font)
    colours = word_colours(token_map)
    views = np.unique(token_map.geometry.is_thumbnail).tolist()
    panels = [_panel(token_map, letters, colours, max_side, thumbnail) for thumbnail in views]
    legend = _legend(token_map, letters, colours, max(panels[0].width, 480))
    heading = [_heading(title, letters, legend.width)] if title else []
    sideways = len(panels) > 1 and panels[0].height > panels[0].width
    body = [_joined(panels, sideways)] if sideways else panels
    return _joined([*heading, *body, legend], sideways=False, margin=MARGIN)


def word_colours(token_map: TokenMap) -> dict[str, Colour]:
    """Colour of every word: palette colours for frequent words with meaning, grey for punctuation and the rest."""
    meant = [word for word, _ in token_map.counts if has_meaning(word)]
    return {word: NEUTRAL for word, _ in token_map.counts} | colours_of(meant)


def run_parts(token_map: TokenMap) -> list[list[int]]:
    """Cells of every run, cut where the grid row or the block changes, so that each part is one rectangle."""
    row_of = np.unique(token_map.places[:, :2], axis=0, return_inverse=True)[1].reshape(-1)
    key = np.stack([token_map.cell_runs, row_of])
    starts = np.flatnonzero((np.diff(key, prepend=-1) != 0).any(axis=0))
    return [part.tolist() for part in np.split(np.arange(len(token_map)), starts[1:])]


def _panel(
    token_map: TokenMap, letters: Lettering, colours: dict[str, Colour], max_side: int, thumbnail: bool
) -> Image.Image:
    """The picture with the words of its tiles, or of its thumbnail."""
    geometry = token_map.geometry
    shown = (geometry.is_thumbnail == thumbnail) & (geometry.areas > 0)
    scale = _scale(geometry.boxes[shown], geometry.image_size, max_side)
    width, height = geometry.image_size
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    boxes = np.rint(geometry.boxes * scale).astype(int)
    canvas = _tinted(token_map, boxes, shown, colours, size)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for x1, y1, x2, y2 in boxes[shown].tolist():
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(255, 255, 255, 70))
    parts = [part for part in run_parts(token_map) if shown[part[0]]]
    if token_map.anchor is None:
        parts = [[cell] for part in parts for cell in part]
    else:
        for part in parts:
            _outline_run(draw, _around(boxes, part), bool(token_map.keeps[part[0]]))
    _outline_blocks(draw, token_map, boxes, shown)
    fitted: dict[tuple[str, int, int], tuple[str, Font] | None] = {}
    for part in _labelled(token_map, parts):
        _write_word(draw, letters, token_map, _around(boxes, part), part[0], fitted)
    return canvas


def _scale(boxes: np.ndarray, image_size: tuple[int, int], max_side: int) -> float:
    """Enlargement at which cells are legible and the drawing is no longer than `max_side`."""
    width, height = np.median(boxes[:, 2] - boxes[:, 0]), np.median(boxes[:, 3] - boxes[:, 1])
    return min(max(CELL_WIDTH / width, CELL_HEIGHT / height), max_side / max(image_size))


def _tinted(
    token_map: TokenMap, boxes: np.ndarray, shown: np.ndarray, colours: dict[str, Colour], size: tuple[int, int]
) -> Image.Image:
    """The enlarged picture, each cell in its word's colour, dark where dropped or not looked at."""
    picture = token_map.image or Image.new("RGB", size, (120, 120, 120))
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = pixels * (1 - GREY) + pixels.mean(axis=2, keepdims=True) * GREY
    result = pixels * (1 - DIM) + np.array(DARK, dtype=np.float32) * DIM
    for cell in np.flatnonzero(shown).tolist():
        x1, y1, x2, y2 = boxes[cell].tolist()
        tint = np.array(colours[token_map.words[cell]], dtype=np.float32)
        if token_map.keeps[cell]:
            result[y1:y2, x1:x2] = pixels[y1:y2, x1:x2] * (1 - TINT) + tint * TINT
    return Image.fromarray(np.rint(result).clip(0, 255).astype(np.uint8))


def _outline_run(draw: ImageDraw.ImageDraw, box: Box, kept: bool) -> None:
    """A run's part as one box: white with a dark rim, or a thin grey line where it is dropped."""
    x1, y1, x2, y2 = box
    if kept:
        draw.rounded_rectangle((x1 + 1, y1 + 1, x2 - 2, y2 - 2), radius=5, outline=(*DARK, 200), width=4)
        draw.rounded_rectangle((x1 + 2, y1 + 2, x2 - 3, y2 - 3), radius=4, outline=(255, 255, 255, 235), width=2)
    else:
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(255, 255, 255, 60))


def _outline_blocks(draw: ImageDraw.ImageDraw, token_map: TokenMap, boxes: np.ndarray, shown: np.ndarray) -> None:
    """Heavy lines between tiles."""
    blocks = np.unique(token_map.places[shown, 0])
    for block in blocks if len(blocks) > 1 else ():
        x1, y1, x2, y2 = _around(boxes, np.flatnonzero(token_map.places[:, 0] == block))
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(*DARK, 255), width=5)
        draw.rectangle((x1 + 1, y1 + 1, x2 - 2, y2 - 2), outline=(255, 255, 255, 255), width=2)


def _labelled(token_map: TokenMap, parts: list[list[int]]) -> list[list[int]]:
    """The part of every run that carries the word: its longest. Without compression, every cell."""
    if token_map.anchor is None:
        return parts
    longest: dict[int, list[int]] = {}
    for part in parts:
        run = int(token_map.cell_runs[part[0]])
        if len(part) > len(longest.get(run, [])):
            longest[run] = part
    return list(longest.values())


def _write_word(
    draw: ImageDraw.ImageDraw,
    letters: Lettering,
    token_map: TokenMap,
    box: Box,
    cell: int,
    fitted: dict[tuple[str, int, int], tuple[str, Font] | None],
) -> None:
    """A word in the middle of a box: white with a dark halo, faint where its cell is dropped."""
    x1, y1, x2, y2 = box
    width, height, word = int(x2 - x1), int(y2 - y1), token_map.words[cell]
    key = (word, width, height)
    if key not in fitted:
        fitted[key] = letters.fit(word, width - 10, height - 4, min(round(height * 0.44), 26), SMALLEST_FONT)
    if (fit := fitted[key]) is None:
        return
    text, font = fit
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    if token_map.keeps[cell]:
        halo = max(round(font.size / 9), 1)
        draw.text(middle, text, (255, 255, 255), font, anchor="mm", stroke_width=halo, stroke_fill=(*DARK, 255))
    else:
        draw.text(middle, text, (175, 178, 184), font, anchor="mm")


def _around(boxes: np.ndarray, cells: Sequence[int] | np.ndarray) -> Box:
    """The rectangle around some cells."""
    x1, y1 = boxes[cells, :2].min(axis=0).tolist()
    x2, y2 = boxes[cells, 2:].max(axis=0).tolist()
    return x1, y1, x2, y2


def _heading(title: str, letters: Lettering, width: int) -> Image.Image:
    """A line of text above the picture."""
    size = max(22, round(width / 70))
    strip = Image.new("RGB", (width, round(size * 1.5)), PAGE)
    if (fit := letters.fit(title, width, strip.height, largest=size, smallest=10)) is not None:
        ImageDraw.Draw(strip).text((0, strip.height / 2), fit[0], INK, fit[1], anchor="lm")
    return strip


def _legend(token_map: TokenMap, letters: Lettering, colours: dict[str, Colour], width: int) -> Image.Image:
    """The most frequent words with their colours and cells, and the token count."""
    size = max(17, round(width / 100))
    line = round(size * 1.75)
    entries = [(word, count) for word, count in token_map.counts if has_meaning(word)][:LEGEND_WORDS]
    x, y, places = 0, 0, []
    for word, count in entries:
        text, font = letters.fit(f"{word} × {count}", width - 2 * size, line, largest=size) or ("", letters.font(size))
        length = round(font.getlength(text) + 2.8 * size)
        if x and x + length - size > width:
            x, y = 0, y + line
        places.append((x, y, text, font, colours[word]))
        x += length
    height = (y + line if places else 0) + line
    strip = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(strip)
    for left, top, text, font, colour in places:
        box = (left, top + (line - size) // 2, left + size, top + (line + size) // 2)
        draw.rounded_rectangle(box, radius=3, fill=tuple(round(part * 0.8 + 25) for part in colour), outline=INK)
        draw.text((left + 1.4 * size, top + line / 2), text, INK, font, anchor="lm")
    fit = letters.fit(summary(token_map), width, line, largest=size, smallest=9)
    if fit is not None:
        draw.text((0, height - line / 2), fit[0], INK, fit[1], anchor="lm")
    return strip


def _joined(parts: Sequence[Image.Image], sideways: bool, margin: int = 0) -> Image.Image:
    """Pictures one below the other, or side by side, on the page colour."""
    gaps = MARGIN * (len(parts) - 1) + 2 * margin
    widths, heights = [part.width for part in parts], [part.height for part in parts]
    width = sum(widths) + gaps if sideways else max(widths) + 2 * margin
    height = max(heights) + 2 * margin if sideways else sum(heights) + gaps
    page = Image.new("RGB", (width, height), PAGE)
    x = y = margin
    for part in parts:
        page.paste(part, (x, y))
        x, y = (x + part.width + MARGIN, y) if sideways else (x, y + part.height + MARGIN)
    return page
