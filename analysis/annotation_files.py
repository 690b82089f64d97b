"""Annotation files in the layouts that people have: COCO instances, GQA scene graphs, boxes of What's Up B."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.processing import load_image

from .annotated_images import AnnotatedImage, AnnotatedObject, clipped_box

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png")
WHATS_UP_BOXES = "bbox.jsonl"


def read_coco(place: str) -> list[AnnotatedImage]:
    """Instances in COCO's layout: polygons, run lengths (plain or compressed) and crowd regions.

    Args:
        place: ``ANNOTATIONS.json:IMAGE_FOLDER``.

    Raises:
        ValueError: the file is no such file, or an entry in it is broken; the message names it.
    """
    file, folder = _file_and_folder("coco", place)
    content = _read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(f"{file.name} is no COCO instances file: it needs images, annotations and categories.")
    categories = {}
    for number, row in enumerate(content["categories"]):
        _require(row, ("id", "name"), f"category {number} of {file.name}")
        categories[row["id"]] = str(row["name"]).strip().lower()
    sizes: dict[Any, tuple[int, int]] = {}
    for number, row in enumerate(content["images"]):
        _require(row, ("id", "file_name", "width", "height"), f"image {number} of {file.name}")
        if row["id"] in sizes:
            raise ValueError(f"image id {row['id']} occurs twice in {file.name}.")
        sizes[row["id"]] = (int(row["width"]), int(row["height"]))
    objects: dict[Any, list[AnnotatedObject]] = {image_id: [] for image_id in sizes}
    for number, row in enumerate(content["annotations"]):
        where = f"annotation {row.get('id', number) if isinstance(row, dict) else number} of {file.name}"
        _require(row, ("image_id", "category_id", "bbox"), where)
        if row["image_id"] not in sizes:
            raise ValueError(f"{where} belongs to image {row['image_id']}, which is not listed.")
        if row["category_id"] not in categories:
            raise ValueError(f"{where} is of category {row['category_id']}, which is not listed.")
        found = _coco_object(row, categories[row["category_id"]], sizes[row["image_id"]], where)
        objects[row["image_id"]] += [] if found is None else [found]
    return [
        AnnotatedImage(
            row["file_name"], tuple(objects[row["id"]]), partial(_open, folder / row["file_name"]), sizes[row["id"]]
        )
        for row in content["images"]
    ]


def read_gqa(place: str) -> list[AnnotatedImage]:
    """Scene graphs of GQA: ``{image id: {width, height, objects: {object id: {name, x, y, w, h, attributes}}}}``.

    Args:
        place: ``SCENE_GRAPHS.json:IMAGE_FOLDER``; pictures are ``IMAGE_FOLDER/<image id>.jpg`` (or .jpeg, .png).

    Raises:
        ValueError: see ``read_coco``.
    """
    file, folder = _file_and_folder("gqa", place)
    content = _read_json(file)
    if not isinstance(content, dict) or not all(isinstance(graph, dict) for graph in content.values()):
        raise ValueError(f"{file.name} is no file of scene graphs: it needs an object of image id -> graph.")
    images = []
    for name, graph in content.items():
        _require(graph, ("width", "height", "objects"), f"image {name} of {file.name}")
        if not isinstance(graph["objects"], dict):
            raise ValueError(f"image {name} of {file.name}: objects must map object ids to objects.")
        size = (int(graph["width"]), int(graph["height"]))
        objects = []
        for key, row in graph["objects"].items():
            where = f"object {key} of image {name} in {file.name}"
            _require(row, ("name", "x", "y", "w", "h"), where)
            box = _box([row[part] for part in "xywh"], size, where)
            words = tuple(str(word).strip().lower() for word in row.get("attributes") or ())
            if box is not None:
                objects.append(AnnotatedObject(str(row["name"]).strip().lower(), box, words))
        images.append(AnnotatedImage(str(name), tuple(objects), partial(_open_stem, folder, str(name)), size))
    return images


def read_whats_up(place: str) -> list[AnnotatedImage]:
    """Boxes of What's Up B: one ``{"image": STEM, "bbox": {name: [x1, y1, x2, y2]}}`` per line.

    Args:
        place: folder with ``bbox.jsonl`` and the pictures ``STEM.jpeg``, beside it or in ``images`` or
            ``controlled_clevr``; boxes can be had without pictures.

    Raises:
        ValueError: see ``read_coco``.
    """
    folder = Path(place).expanduser()
    file = folder / WHATS_UP_BOXES
    if not file.is_file():
        raise ValueError(f"{folder} holds no {WHATS_UP_BOXES}; accepted is a folder with the boxes of What's Up B.")
    places = [folder / name for name in ("images", "controlled_clevr", "") if (folder / name).is_dir()]
    images = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {WHATS_UP_BOXES} is no JSON: {error}.") from None
        _require(row, ("image", "bbox"), f"line {number} of {WHATS_UP_BOXES}")
        objects = []
        for name, box in row["bbox"].items():
            where = f"box of {name!r} in line {number} of {WHATS_UP_BOXES}"
            corners = _numbers(box, where)
            if not (corners[0] < corners[2] and corners[1] < corners[3]):
                raise ValueError(f"{where} must be x1 < x2, y1 < y2 as (x1, y1, x2, y2), got {box}.")
            objects.append(AnnotatedObject(name.strip().lower(), corners))
        images.append(AnnotatedImage(row["image"], tuple(objects), partial(_open_first, places, row["image"])))
    return images


READERS: dict[str, Callable[[str], list[AnnotatedImage]]] = {
    "coco": read_coco,
    "gqa": read_gqa,
    "whatsup_b": read_whats_up,
}


def _coco_object(row: dict[str, Any], name: str, size: tuple[int, int], where: str) -> AnnotatedObject | None:
    box, shape = _box(row["bbox"], size, where), row.get("segmentation")
    if isinstance(shape, dict) and list(map(int, shape.get("size", ()))) != [size[1], size[0]]:
        raise ValueError(f"{where}: segmentation of size {shape.get('size')}, the image is [{size[1]}, {size[0]}].")
    if isinstance(shape, dict) and "counts" not in shape:
        raise ValueError(f"{where}: a segmentation that is no list of polygons needs size and counts.")
    if isinstance(shape, list) and not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in shape):
        raise ValueError(f"{where}: a polygon needs at least three points x, y.")
    mask = partial(decode_segmentation, shape, size) if shape else None
    if box is None:
        return None
    polygons = tuple(tuple(map(float, part)) for part in shape) if isinstance(shape, list) else ()
    area = float(row["area"]) if isinstance(row.get("area"), int | float) else None
    return AnnotatedObject(name, box, (), bool(row.get("iscrowd", 0)), mask, polygons, area)


def decode_segmentation(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """Turn a COCO segmentation into a mask.

    Args:
        shape: list of polygons [x, y, x, y, ...], or run lengths {"size": [h, w], "counts": numbers or text}.
        size: (width, height) of the image.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        from pycocotools import mask as masks
    except ImportError as error:
        raise ValueError("masks of COCO files need pycocotools: pip install 'dualstream[analysis]'.") from error
    width, height = size
    if isinstance(shape, list):
        shape = masks.merge(masks.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = masks.frPyObjects(shape, height, width)
    return masks.decode(shape).astype(bool)


def _file_and_folder(kind: str, place: str) -> tuple[Path, Path]:
    file, separator, folder = place.rpartition(":")
    paths = Path(file).expanduser(), Path(folder).expanduser()
    if not separator or not paths[0].is_file() or not paths[1].is_dir():
        raise ValueError(
            f"data='{kind}:{place}' needs {kind}:FILE.json:IMAGE_FOLDER with a file and a folder that exist."
        )
    return paths


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is no JSON file: {error}.") from None


def _require(row: Any, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if key not in row] if isinstance(row, dict) else list(keys)
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}.")


def _numbers(values: Any, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: a box is four numbers, got {values!r}.") from None
    if not np.isfinite([a, b, c, d]).all():
        raise ValueError(f"{where}: a box is four finite numbers, got {values!r}.")
    return a, b, c, d


def _box(values: Any, size: tuple[int, int], where: str) -> tuple[float, float, float, float] | None:
    """x, y, width, height as corners within the image; None without an area there."""
    x, y, width, height = _numbers(values, where)
    if width < 0 or height < 0:
        raise ValueError(f"{where}: a box is x, y, width, height with no negative extent, got {values}.")
    return clipped_box((x, y, x + width, y + height), size)


def _open(path: Path) -> Image:
    try:
        return load_image(path.read_bytes())  # from bytes, so that no error message holds a path of this machine
    except FileNotFoundError:
        raise ValueError(f"picture {path.name!r} is not in the image folder.") from None


def _open_stem(folder: Path, stem: str) -> Image:
    return _open_first([folder], stem)


def _open_first(folders: list[Path], stem: str) -> Image:
    tried = (folder / f"{stem}{suffix}" for folder in folders for suffix in SUFFIXES)
    return _open(next((path for path in tried if path.is_file()), Path(f"{stem}{SUFFIXES[0]}")))
