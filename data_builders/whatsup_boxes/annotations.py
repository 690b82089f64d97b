"""What's Up annotations as they are published: one JSON line per picture, and one Pascal-VOC file per picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELATIONS = {"left_of": "left", "right_of": "right", "in-front_of": "front", "behind": "behind"}
RELATIONS |= {"on": "on", "under": "under"}
AXES = {"left": "horizontal", "right": "horizontal", "front": "depth", "behind": "depth"}
AXES |= {"on": "vertical", "under": "vertical"}
JSONL_FORM = '{"image": STEM, "bbox": {NAME: [xmin, ymin, xmax, ymax]}}'
MAX_XML_BYTES = 1_000_000  # an annotation has some two thousand
_STEM = re.compile(rf"(.+?)_({'|'.join(RELATIONS)})_(.+)")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Stem:
    """What a picture's file name says.

    Attributes:
        subject: the object whose place is told.
        relation: where it is: left, right, front, behind, on or under.
        reference: the object it is told by.
    """

    subject: str
    relation: str
    reference: str

    @classmethod
    def parse(cls, stem: str) -> Stem:
        """Read a file name without its ending, ``mug_left_of_plate``.

        Raises:
            ValueError: it has another form.
        """
        match = _STEM.fullmatch(stem)
        if match is None:
            raise ValueError(
                f"{stem!r} is not OBJECT_RELATION_OBJECT with one of the relations {', '.join(RELATIONS)}."
            )
        return cls(match[1], RELATIONS[match[2]], match[3])

    @property
    def names(self) -> tuple[str, str]:
        """The two objects, subject first."""
        return self.subject, self.reference

    @property
    def set_id(self) -> str:
        """Pictures of the same two objects in the same roles."""
        return f"{self.subject}|{self.reference}"

    @property
    def pair_id(self) -> str:
        """The two pictures of a set that differ in one axis."""
        return f"{self.set_id}|{AXES[self.relation]}"


@dataclass(frozen=True)
class Annotation:
    """The boxes that one source gives for one picture.

    Attributes:
        boxes: object -> xmin, ymin, xmax, ymax in pixels, origin at the top left.
        size: width and height in pixels; None where the source does not tell.
        truncated: objects marked as cut off by the picture's border.
        file_name: the picture's file as the annotation names it; None where it does not.
    """

    boxes: dict[str, Box]
    size: tuple[int, int] | None = None
    truncated: frozenset[str] = frozenset()
    file_name: str | None = None


def read_jsonl(path: Path) -> Iterator[tuple[str, Annotation]]:
    """Yield the picture's stem and its boxes, line by line.

    Raises:
        ValueError: a line is cut short or not of the published form, with its number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    boxes = {str(name): _box(corners) for name, corners in row["bbox"].items()}
                    yield str(row["image"]), Annotation(boxes)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path.name}, line {number}: not {JSONL_FORM}: {error}") from error


def read_voc_folder(folder: Path) -> Iterator[tuple[str, Annotation]]:
    """Yield the picture's stem (the XML file's own) and its boxes, in the order of the names.

    Raises:
        ValueError: there is no XML file, or one is damaged, hostile or not of the Pascal-VOC form.
    """
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise ValueError(f"--voc-xml {folder.name} holds no *.xml file.")
    for path in files:
        yield path.stem, read_voc(path)


def read_voc(path: Path) -> Annotation:
    """Read one Pascal-VOC file.

    Raises:
        ValueError: it is too large, declares a document type or entities, is cut short or lacks a field.
    """
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    content = path.read_bytes()
    if len(content) > MAX_XML_BYTES:
        raise ValueError(f"{path.name} has {len(content):,} bytes; an annotation has at most {MAX_XML_BYTES:,}.")
    try:
        root = fromstring(content, forbid_dtd=True)
        objects = [(_text(item, "name"), item) for item in root.iter("object")]
        names = [name for name, _ in objects]
        if len(set(names)) != len(names):
            raise ValueError(f"it names an object twice: {', '.join(names)}")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = {name: _box([_text(item, f"bndbox/{corner}") for corner in corners]) for name, item in objects}
        size = int(_text(root, "size/width")), int(_text(root, "size/height"))
        truncated = frozenset(name for name, item in objects if item.findtext("truncated", "0").strip() == "1")
    except DefusedXmlException as error:
        raise ValueError(f"{path.name} declares a document type or entities, which no annotation needs.") from error
    except (ParseError, ValueError) as error:
        raise ValueError(f"{path.name} is no Pascal-VOC annotation: {error}") from error
    return Annotation(boxes, size, truncated, root.findtext("filename"))


def _text(element: Any, tag: str) -> str:
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise ValueError(f"<{tag}> is missing or empty")
    return text.strip()


def _box(corners: Any) -> Box:
    if len(corners) != 4:
        raise ValueError(f"a box has four numbers, not {len(corners)}")
    numbers = [float(corner) for corner in corners]
    if any(number != int(number) for number in numbers):
        raise ValueError(f"a box is in whole pixels, not {list(corners)}")
    xmin, ymin, xmax, ymax = (int(number) for number in numbers)
    return xmin, ymin, xmax, ymax
