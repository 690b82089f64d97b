"""Pictures that must not be trained on: told by their id, by their pixels, or by looking nearly the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dualstream.data_builders.token_maps.images import SUFFIXES, image_hash

NEAR_BITS = 3  # two pictures whose 64-bit difference hashes differ in at most this many bits count as the same


class HeldOut:
    """The test pictures.

    Attributes:
        ids: their ids.
        hashes: SHA-256 of their pixels, see ``image_hash``.

    Args:
        ids: image ids.
        images: picture files; the stem of a file name counts as an id too.

    Raises:
        ValueError: a picture cannot be read.
    """

    def __init__(self, ids: Iterable[str] = (), images: Iterable[Path] = ()) -> None:
        files = list(images)
        self.ids = {str(name) for name in ids} | {path.stem for path in files}
        self.hashes: set[str] = set()
        looks = []
        for path in tqdm(files, desc="held-out images", unit="image", disable=None):
            image = open_rgb(path)
            self.hashes.add(image_hash(image))
            looks.append(difference_hash(image))
        self._looks = np.asarray(looks, np.uint8).reshape(-1, 8)

    def reason(self, image_id: str, image: Image.Image | None = None) -> str | None:
        """Say why a picture is held out: ``id``, ``pixels`` or ``near``; None if it is not.

        Args:
            image_id: its id.
            image: the RGB picture; without it only the id is looked at.
        """
        if image_id in self.ids:
            return "id"
        if image is None or not len(self._looks):
            return None
        if image_hash(image) in self.hashes:
            return "pixels"
        different = np.unpackbits(self._looks ^ np.asarray(difference_hash(image), np.uint8), axis=1).sum(1)
        return "near" if int(different.min()) <= NEAR_BITS else None


def difference_hash(image: Image.Image) -> list[int]:
    """Eight bytes, a bit for every two horizontal neighbours of the 9 x 8 grey miniature: which one is brighter.

    Another size or another strength of JPEG compression changes few bits or none.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1], axis=1)[:, 0].tolist()


def open_rgb(path: Path) -> Image.Image:
    """Open a picture as 8-bit RGB, turned as its camera says.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def images_under(folder: Path) -> list[Path]:
    """All picture files below a folder, sorted.

    Raises:
        ValueError: the folder is missing or has no picture.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} is no folder with pictures ({', '.join(sorted(SUFFIXES))}).")
    return files


def read_ids(path: Path) -> set[str]:
    """Image ids of a file: a JSON list of ids, a JSON object of questions with ``imageId``, or one id per line.

    Raises:
        ValueError: the file is missing or of another form.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give image ids as a JSON list, GQA questions, or one id per line.")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return {line.strip() for line in text.splitlines() if line.strip()}
    content = json.loads(text)
    if isinstance(content, dict):
        content = [entry.get("imageId") if isinstance(entry, dict) else None for entry in content.values()]
    if not isinstance(content, list) or not all(isinstance(entry, (str, int)) for entry in content):
        raise ValueError(f"{path} holds neither a list of image ids nor GQA questions with 'imageId'.")
    return {str(entry) for entry in content}
