"""Write the readings of a picture as one self-contained web page."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from .page_data import Outline, page_data, shown, to_script
from .reading_series import ReadingSeries
from .token_map_text import summary

if TYPE_CHECKING:
    from PIL import Image

    from .token_map import TokenMap

SCRIPTS = ("data.js", "view.js", "stage.js", "panel.js", "page.js")


def render_html(token_map: TokenMap, title: str = "Token map") -> str:
    """A page that shows the picture, its words, and on hover what stands behind each of them.

    Args:
        token_map: a map with geometry; without a picture the words stand on plain grey.
        title: heading of the page.

    Returns:
        The HTML text, UTF-8.

    Raises:
        ValueError: if the map has no geometry.
    """
    series = ReadingSeries.from_token_map(token_map)
    return render_page([series], token_map.image, title, summary(token_map), compressed_first=bool(series.plans))


def render_page(
    series: Sequence[ReadingSeries],
    image: Image.Image | None,
    title: str,
    note: str = "",
    outlines: Sequence[Outline] = (),
    compressed_first: bool = False,
) -> str:
    """A page on one picture: its words by depth, the probability of a word, runs and compression, two views at once.

    Everything is inside the page (picture, styles, scripts, arrays). Its content security policy forbids any request
    and any script but its own, which is named by its hash.

    Args:
        series: readings of the picture, by one model each.
        image: the picture; without it the words stand on plain grey.
        title: heading of the page.
        note: line below the heading.
        outlines: objects that can be drawn over the picture.
        compressed_first: show what the first compression keeps before anything is chosen.

    Returns:
        The HTML text; it can be encoded as UTF-8 whatever the texts are.

    Raises:
        ValueError: if there is no series, or pictures of different sizes were read.
    """
    data = to_script(page_data(series, image, outlines, compressed_first))
    script = "".join(template(name) for name in SCRIPTS)
    return fill(
        template("page.html"),
        TITLE=html.escape(shown(title)),
        SUMMARY=html.escape(shown(note)),
        DATA=data,
        **inline(template("page.css"), script),
    )


@cache
def template(name: str) -> str:
    """Text of a file of ``templates/``."""
    return resources.files(__package__).joinpath(f"templates/{name}").read_text(encoding="utf-8")


def inline(style: str, script: str) -> dict[str, str]:
    """Style and script of a page, and the policy that allows these two alone, to be given to ``fill``."""
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    return {"POLICY": policy, "STYLE": style, "SCRIPT": script}


def fill(page: str, **parts: str) -> str:
    """Put texts in the place of their ``<!--NAME-->``; what is put in is not searched again."""
    for name in parts:
        if page.count(f"<!--{name}-->") < 1:
            raise ValueError(f"the page has no place for {name}.")
    pieces = page.split("<!--")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, end, rest = piece.partition("-->")
        filled.append(parts[name] + rest if end and name in parts else f"<!--{piece}")
    return "".join(filled)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
