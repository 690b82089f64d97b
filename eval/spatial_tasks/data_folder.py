"""The folder that holds the benchmarks' annotations and pictures, which nobody may redistribute but everybody can get.

``docs/spatial_tasks.md`` shows its layout. Nothing is downloaded here. What is missing is listed in one message, and a
file that is only half there is told from one that is absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_VARIABLE = "DUALSTREAM_DATA"
STAND_IN_VARIABLE = "DUALSTREAM_STAND_IN_IMAGES"
_PROMPTS = "whatsup_prompts"


class MissingDataError(FileNotFoundError):
    """Annotations or pictures of a task are not in the data folder."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark's files are looked for, below the data folder.

    Attributes:
        annotations: names of the annotation file, the first one found is used.
        images: folders of the pictures, likewise.
        count: number of items of the complete benchmark.
        sha256: of the annotation file our figures were made with; None: it is not known.
        prompts: a file of questions about the same items in the same order. It stands in for the annotations, with the
            descriptions written anew, where it names the objects and the pictures are not needed.
        prompts_sha256: likewise.
    """

    annotations: tuple[str, ...]
    images: tuple[str, ...]
    count: int
    sha256: str | None = None
    prompts: str | None = None
    prompts_sha256: str | None = None


def _whats_up(name: str, images: tuple[str, ...], count: int, prompts: str, digest: str, *names: str) -> Source:
    files = tuple(f"{folder}{file}" for file in (name, *names) for folder in ("whatsup/", ""))
    return Source(files, images, count, prompts=f"{_PROMPTS}/{prompts}.jsonl", prompts_sha256=digest)


_COCO = ("coco/val2017", "whatsup/val2017", "val2017")
_GENOME = ("whatsup/vg_images", "vg_images", "gqa/images")
_VSR = ("vsr/images", "vsr/images/test")
SOURCES: dict[str, Source] = {
    "whatsup_a": _whats_up(
        "controlled_images_dataset.json",
        ("whatsup/controlled_images", "controlled_images"),
        412,
        "Controlled_Images_A_with_answer_four_options",
        "96cc5ecc0ed899b8508596b67bfa95a8976abfaf685269b32d53be1d176bd7fc",
    ),
    "whatsup_b": _whats_up(
        "controlled_clevr_dataset.json",
        ("whatsup/controlled_clevr", "controlled_clevr"),
        408,
        "Controlled_Images_B_with_answer_four_options",
        "f63ed5edd55ad88dc77716fbeccb6521c5ea3b63bfdd9f837e3787d187f93a1f",
    ),
    "coco_spatial_one": _whats_up(
        "coco_qa_one_obj.json",
        _COCO,
        2247,
        "COCO_QA_one_obj_with_answer_four_options",
        "b48b5686ecfeab2ad62a11b5b167f1ba41e16157e798c1c3d482f33e7cc18d6e",
    ),
    "coco_spatial_two": _whats_up(
        "coco_qa_two_obj.json",
        _COCO,
        440,
        "COCO_QA_two_obj_with_answer_four_options",
        "2ed88e73462b2660e4b59a7c8f0beedcf58551cf6574602b6d34e4d3d9bf9ffb",
    ),
    "gqa_spatial_one": _whats_up(
        "vg_qa_one_obj.json",
        _GENOME,
        1160,
        "VG_QA_one_obj_with_answer_six_options",
        "c2adb86edbe1461800268729ddeadf24bac2a7cd251e5262387849bc0d72fab3",
        "vg_qa_one_obj_v2.json",
    ),
    "gqa_spatial_two": _whats_up(
        "vg_qa_two_obj.json",
        _GENOME,
        291,
        "VG_QA_two_obj_with_answer_six_options",
        "9469a37098e5b69fcbc8d5c72ea5b2f60e348794f405d063af46f0bbdea01370",
        "vg_qa_two_obj_v2.json",
    ),
    "vsr_random": Source(
        ("vsr/random/test.jsonl",),
        _VSR,
        2195,
        "8ade82a0b93ac9dc1e53f6cf1f11e9d5536776a3715102b6b4d27d4f81d551cc",
    ),
    "vsr_zeroshot": Source(
        ("vsr/zeroshot/test.jsonl",),
        _VSR,
        1222,
        "914d9156723b912d8f794b179248af865a68c5f81c9d8e3a21d007778cacaad4",
    ),
}


@dataclass(frozen=True)
class Found:
    """What of a source is there.

    Attributes:
        annotations: the file.
        official: whether it is the benchmark's own, not the file of prompts.
        images: folder of the pictures, None where there is none.
        known: whether the file has the hash our figures were made with; None: no hash is on record.
    """

    annotations: Path
    official: bool
    images: Path | None
    known: bool | None


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The data folder: the one given, or the one that ``DUALSTREAM_DATA`` names.

    Raises:
        MissingDataError: none is named, or it is not a folder.
    """
    name = root or os.environ.get(DATA_VARIABLE)
    if not name:
        raise MissingDataError(
            f"No data folder: set {DATA_VARIABLE} to the folder that docs/spatial_tasks.md describes."
        )
    path = Path(name).expanduser()
    if not path.is_dir():
        raise MissingDataError(f"The data folder {path} is not there ({DATA_VARIABLE}).")
    return path.resolve()


def stand_in_images() -> bool:
    """Whether pictures are replaced by coloured panes, for a rehearsal without any."""
    return os.environ.get(STAND_IN_VARIABLE, "").lower() in ("1", "true", "yes")


def find(task: str, root: Path) -> Found:
    """Find a task's files.

    Raises:
        MissingDataError: there is no annotation file.
    """
    source = SOURCES[task]
    images = next((root / name for name in source.images if (root / name).is_dir()), None)
    path = next((root / name for name in source.annotations if (root / name).is_file()), None)
    if path is not None:
        return Found(path, True, images, _matches(path, source.sha256))
    if source.prompts and (root / source.prompts).is_file():
        path = root / source.prompts
        return Found(path, False, images, _matches(path, source.prompts_sha256))
    names = [name for name in (*source.annotations, source.prompts) if name]
    raise MissingDataError(f"{task}: no annotations in {root}; looked for {', '.join(names)}.")


def read_json(path: Path) -> list[Any]:
    """The rows of a JSON list or of a file with one JSON object per line.

    Raises:
        ValueError: it cannot be read to its end, as after an interrupted download.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json" and text.lstrip()[:1] == "[":
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}); is the download complete?") from None


def check_count(task: str, found: int, path: Path) -> None:
    """Compare the number of items with that of the complete benchmark.

    Raises:
        ValueError: they differ.
    """
    expected = SOURCES[task].count
    if found != expected:
        raise ValueError(f"{task}: {path} has {found} items, the complete benchmark has {expected}.")


def _matches(path: Path, digest: str | None) -> bool | None:
    return None if digest is None else hashlib.sha256(path.read_bytes()).hexdigest() == digest
