"""Write a report: a page per picture, an index with small pictures that can be searched by word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dualstream import __version__
from dualstream.analysis.annotated_images import AnnotatedImage
from dualstream.data_builders.token_maps.atomic import atomic_file
from dualstream.processing.page_data import Outline, picture_uri, shown
from dualstream.processing.reading_series import ReadingSeries
from dualstream.processing.token_map_html import inline, render_page
from dualstream.processing.words import has_meaning, visible

from .series import PictureSource

THUMBNAIL_SIDE = 200
WORDS_SHOWN = 6


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        index: the index page.
        pages: picture -> its page, relative to the folder of the index.
    """

    index: Path
    pages: dict[str, str]


def write_report(
    sources: Sequence[PictureSource], out: str | Path, limit: int | None = None, title: str = ""
) -> Report:
    """Write a page for every picture that all sources have, and ``index.html``.

    Every file is whole by itself and asks for nothing; the links between them are relative, so the folder can be moved
    or mailed. A killed run leaves no half page; pages that exist are written anew.

    Args:
        sources: what read the pictures; several are shown side by side.
        out: folder of the report; made if it is missing.
        limit: most pictures; None: all.
        title: of the index.

    Raises:
        ValueError: there is no source, or no picture that all of them have.
    """
    if not sources:
        raise ValueError("sources must hold at least one run or model.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    shared = set.intersection(*({image.name for image in source.images} for source in sources))
    images = [image for image in sources[0].images if image.name in shared][:limit]
    if not images:
        counts = " and ".join(str(len(source.images)) for source in sources)
        raise ValueError(f"there is no picture to show: the sources have {counts} pictures, none in common.")
    out = Path(out)
    (out / "pages").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, image in enumerate(tqdm(images, desc="pages", unit="picture", disable=None)):
        entries.append(_write_page(sources, image, out, number))
    with atomic_file(out / "index.html") as file:
        file.write(render_index(entries, title or "What the pictures read as").encode())
    return Report(out / "index.html", {entry["name"]: entry["page"] for entry in entries})


def outlines_of(image: AnnotatedImage) -> list[Outline]:
    """The objects of a picture as a page draws them."""
    return [Outline(item.name, item.box, item.mask) for item in image.objects]


def render_index(entries: Sequence[dict[str, Any]], title: str) -> str:
    """The index; every text is escaped, and its policy allows its own script alone."""
    from importlib.resources import files

    from jinja2 import Environment

    folder = files("dualstream.analysis").joinpath("templates")
    page, style, script = (
        folder.joinpath(f"what_index.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    template = Environment(autoescape=True).from_string(page)
    models = list(dict.fromkeys(model["name"] for entry in entries for model in entry["models"]))
    return template.render(
        entries=entries, models=models, title=shown(title), version=__version__, **inline(style, script)
    )


def _write_page(sources: Sequence[PictureSource], image: AnnotatedImage, out: Path, number: int) -> dict[str, Any]:
    """Write the page of a picture; return what the index says of it."""
    series = [source.series(image) for source in sources]
    picture = image.image()
    page = f"pages/{number + 1:04d}-{_slug(image.name)}.html"
    text = render_page(series, picture, image.name, _note(series), outlines_of(image))
    with atomic_file(out / page) as file:
        file.write(text.encode())
    return {
        "name": shown(image.name),
        "page": page,
        "picture": picture_uri(picture, THUMBNAIL_SIDE, quality=75),
        "models": [_entry(item) for item in series],
    }


def _note(series: Sequence[ReadingSeries]) -> str:
    return "; ".join(
        f"{item.name}: {len(item.geometry)} visual tokens, {len(item.points)} readings" for item in series
    )


def _entry(item: ReadingSeries) -> dict[str, Any]:
    """What the index says of one model's reading at the point that is shown first."""
    pieces = [item.pieces[number] for number in item.ids[item.start, :, 0].tolist()]
    counts = Counter(visible(piece) for piece in pieces if has_meaning(piece))
    words = [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    plan = item.plans[0] if item.plans else None
    cells = len(item.geometry)
    return {
        "name": item.name,
        "words": words,
        "shown": words[:WORDS_SHOWN],
        "cells": cells,
        "kept": None if plan is None else int(plan.tokens[item.start]),
        "method": None if plan is None else plan.name,
    }


def _slug(name: str) -> str:
    """A file name that every system takes and that needs no escaping in a link."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "picture"
