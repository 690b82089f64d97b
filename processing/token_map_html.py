"""Write a token map as one self-contained web page."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from .token_map_image import run_parts, word_colours
from .token_map_text import block_title, summary
from .words import has_meaning

if TYPE_CHECKING:
    from PIL import Image

    from .token_map import TokenMap

PICTURE_SIDE = 1600  # longest side of the embedded picture in pixels
LEGEND_WORDS = 24


def render_html(token_map: TokenMap, title: str = "Token map") -> str:
    """A page that shows the picture, its words, and on hover what stands behind each of them.

    Everything is inside the page (picture, styles, script); its content security policy forbids any request. Hovering,
    tapping or focusing a cell shows the word, the further readings with their probabilities, and the run; a search box
    highlights the cells of a word.

    Args:
        token_map: a map with geometry; without a picture the words stand on plain grey.
        title: heading of the page.

    Returns:
        The HTML text, UTF-8.

    Raises:
        ValueError: if the map has no geometry.
    """
    if token_map.geometry is None:
        raise ValueError("the token map has no geometry; make it with token_geometry(processor, image.size).")
    page = resources.files(__package__).joinpath("templates/token_map.html").read_text(encoding="utf-8")
    data = json.dumps(_page_data(token_map), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "TITLE": html.escape(title),
        "SUMMARY": html.escape(summary(token_map)),
        # inside a script element only "<" could end it early
        "DATA": data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _page_data(token_map: TokenMap) -> dict[str, Any]:
    """What the page's script draws, as plain JSON values."""
    geometry = token_map.geometry
    colours = {word: "#{:02x}{:02x}{:02x}".format(*colour) for word, colour in word_colours(token_map).items()}
    pieces = {str(number): piece for number, piece in token_map.pieces.items()}
    scores = token_map.scores
    runs = token_map.runs
    return {
        "size": list(geometry.image_size),
        "picture": None if token_map.image is None else _data_uri(token_map.image),
        "boxes": np.round(geometry.boxes, 2).tolist(),
        "words": token_map.words,
        "ids": token_map.ids.tolist(),
        "probabilities": None if scores is None else np.round(np.exp(scores.astype(float)), 4).tolist(),
        "pieces": pieces,
        "places": geometry.places.tolist(),
        "thumbnail": geometry.is_thumbnail.tolist(),
        "blocks": [block_title(token_map, number) for number in range(len(token_map.grids))],
        "run": token_map.cell_runs.tolist(),
        "lengths": [run.length for run in runs],
        "kept": token_map.keeps.tolist(),
        "parts": run_parts(token_map),
        "compressed": token_map.anchor is not None,
        "colours": colours,
        "legend": [[word, count] for word, count in token_map.counts if has_meaning(word)][:LEGEND_WORDS],
    }


def _data_uri(image: Image.Image) -> str:
    """The picture as a data URI: PNG where it is small, JPEG otherwise."""
    picture = image.convert("RGB")
    stream = io.BytesIO()
    if max(picture.size) <= 256:
        picture.save(stream, "PNG")
        kind = "png"
    else:
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        picture.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
