"""Rows of the What's Up box dataset, with or without the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, Image, List, Value
from PIL import Image as PillowImage

from dualstream.processing.images import whole_pictures_only

from .annotations import AXES
from .consistency import Picture

IMAGE_ENDINGS = (".jpeg", ".jpg", ".png")
MAX_PIXELS = 100_000_000
BOX = (
    "xmin, ymin, xmax, ymax in pixels of the picture as published, origin top left, as the annotation tool saved them"
)
COLUMNS: dict[str, str] = {
    "image_id": "file name of the picture in What's Up, without its ending",
    "image": "the picture, byte for byte as published",
    "width": "of the picture, pixels; null where no source tells",
    "height": "likewise",
    "caption": "the true description",
    "subject": "the object whose place is told",
    "reference": "the object it is told by",
    "relation": "where the subject is",
    "axis": "what the relation is about",
    "subject_box": BOX,
    "reference_box": "likewise",
    "subject_truncated": "whether it is marked as cut off by the border",
    "reference_truncated": "likewise",
    "set_id": "the pictures of one subject and one reference, four when complete",
    "pair_id": "the two of them that differ along one axis",
    "box_source": "which sources agree with these boxes",
}
_PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
    "on": "on",
    "under": "under",
}


def make_features(pictures: Sequence[Picture], with_images: bool) -> Features:
    """The typed columns; class names are those that occur, in a fixed order."""
    names = sorted({name for picture in pictures for name in picture.parsed.names})
    present = {picture.parsed.relation for picture in pictures}
    relations = [relation for relation in AXES if relation in present]
    box = List(Value("int32"), length=4)
    columns: dict[str, Any] = {
        "image_id": Value("string"),
        "image": Image(),
        "width": Value("int32"),
        "height": Value("int32"),
        "caption": Value("string"),
        "subject": ClassLabel(names=names),
        "reference": ClassLabel(names=names),
        "relation": ClassLabel(names=relations),
        "axis": ClassLabel(names=list(dict.fromkeys(AXES[relation] for relation in relations))),
        "subject_box": box,
        "reference_box": box,
        "subject_truncated": Value("bool"),
        "reference_truncated": Value("bool"),
        "set_id": Value("string"),
        "pair_id": Value("string"),
        "box_source": ClassLabel(names=["both", "jsonl", "voc"]),
    }
    return Features({name: feature for name, feature in columns.items() if with_images or name != "image"})


def make_row(picture: Picture, image_file: Path | None = None) -> dict[str, Any]:
    """One row; its picture is read as bytes, so that nothing is compressed again."""
    parsed = picture.parsed
    width, height = picture.size or (None, None)
    row: dict[str, Any] = {
        "image_id": picture.stem,
        "width": width,
        "height": height,
        "caption": " ".join(
            (_with_article(parsed.subject, "A"), _PHRASES[parsed.relation], _with_article(parsed.reference, "a"))
        ),
        "subject": parsed.subject,
        "reference": parsed.reference,
        "relation": parsed.relation,
        "axis": AXES[parsed.relation],
        "subject_box": list(picture.boxes[0]),
        "reference_box": list(picture.boxes[1]),
        "subject_truncated": picture.truncated[0],
        "reference_truncated": picture.truncated[1],
        "set_id": parsed.set_id,
        "pair_id": parsed.pair_id,
        "box_source": picture.sources,
    }
    if image_file is not None:
        row["image"] = {"bytes": image_file.read_bytes(), "path": image_file.name}
    return row


def _with_article(name: str, article: str) -> str:
    spoken = name.replace("_", " ").replace("-", " ")
    if spoken in ("headphones", "scissors", "sunglasses"):
        return spoken if article == "a" else spoken.capitalize()
    return f"{article}{'n' if spoken[0] in 'aeiou' else ''} {spoken}"


def find_images(pictures: Sequence[Picture], folder: Path) -> dict[str, Path]:
    """Return the file of every picture, each opened once.

    Raises:
        FileNotFoundError: pictures are missing, with their number and the first names.
        ValueError: files cannot be decoded, or have another size than the annotation says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is no folder.")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_ENDINGS}
    missing = [picture.stem for picture in pictures if picture.stem not in files]
    if missing:
        raise FileNotFoundError(
            f"--images {folder} lacks {len(missing)} of {len(pictures)} pictures: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; accepted endings are {', '.join(IMAGE_ENDINGS)}."
        )
    wrong = [trouble for picture in pictures if (trouble := _trouble(picture, files[picture.stem]))]
    if wrong:
        raise ValueError("Pictures that cannot be used:\n- " + "\n- ".join(wrong))
    return {picture.stem: files[picture.stem] for picture in pictures}


def _trouble(picture: Picture, path: Path) -> str | None:
    try:
        with PillowImage.open(io.BytesIO(path.read_bytes())) as image, whole_pictures_only():
            if image.width * image.height > MAX_PIXELS:
                return f"{path.name}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
            image.load()
            if picture.size is not None and image.size != picture.size:
                return (
                    f"{path.name}: {image.width} x {image.height}, annotated as {picture.size[0]} x {picture.size[1]}"
                )
    except (OSError, ValueError, PillowImage.DecompressionBombError) as error:
        return f"{path.name}: {error}"
    return None
