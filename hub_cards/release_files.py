"""The files of a release: what goes up, under which name, with which hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

CARD = "README.md"
# Left behind by tools and training runs; never part of a release.
LEFT_OUT = (
    ".git/*",
    "*/__pycache__/*",
    "__pycache__/*",
    "*.pyc",
    ".DS_Store",
    "*/.DS_Store",
    ".cache/*",
    ".ipynb_checkpoints/*",
    "checkpoint-*/*",
    "runs/*",
    ".gitattributes",
)
PLACEHOLDER = '"REPO_OR_FOLDER"'  # what a generated card loads from until it is released


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release.

    Attributes:
        name: path in the repository, with forward slashes.
        path: where it lies here.
        replaced: content that goes up instead, None for the file's own.
    """

    name: str
    path: Path
    replaced: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that go up."""
        return self.path.stat().st_size if self.replaced is None else len(self.replaced)

    @cached_property
    def sha256(self) -> str:
        """Of what goes up; large files are read in pieces."""
        if self.replaced is not None:
            return hashlib.sha256(self.replaced).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def git_hash(self) -> str:
        """Git's own hash of the content, by which a Hub knows small files."""
        content = self.content()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    def content(self) -> bytes:
        """What goes up, read whole."""
        return self.path.read_bytes() if self.replaced is None else self.replaced


def list_files(folder: Path, repo_id: str, tag: str) -> list[ReleaseFile]:
    """List a folder for release; the card's load snippet names the repository and the revision.

    Args:
        folder: the checkpoint, dataset or Space.
        repo_id: OWNER/NAME.
        tag: the revision that the snippet pins.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    files = [ReleaseFile(name, path) for name, path in _walk(folder)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no file to release.")
    return [_pinned(file, repo_id, tag) if file.name == CARD else file for file in files]


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            yield name, path


def _pinned(card: ReleaseFile, repo_id: str, tag: str) -> ReleaseFile:
    text = card.path.read_bytes().decode("utf-8", errors="replace")
    if PLACEHOLDER not in text:
        return card
    return ReleaseFile(card.name, card.path, text.replace(PLACEHOLDER, f'"{repo_id}", revision="{tag}"').encode())
