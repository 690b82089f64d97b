"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: partial files of killed processes then stay until somebody deletes them
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name, complete and on disk, when the block ends well.

    Until then the bytes go to a hidden file beside it, locked for as long as this process lives; see
    ``remove_orphans``. If the block raises, nothing is left.

    Args:
        path: final name; an old file there is replaced. Its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, handle = _open_partial(path)
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(partial, path)  # while locked, so that nobody takes it for an orphan
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write JSON values with ``atomic_file``."""
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the values of a JSON file, or None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def remove_orphans(folder: Path) -> int:
    """Delete the partial files under a folder whose writers are dead; those being written are left alone.

    Returns:
        How many were deleted.
    """
    if fcntl is None:
        return 0
    removed = 0
    for path in folder.rglob(f".*{PARTIAL}"):
        with suppress(FileNotFoundError), path.open("rb") as handle:
            if _locked(handle):
                path.unlink()
                removed += 1
    return removed


def _open_partial(path: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a hidden file that no other writer uses."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        handle = partial.open("xb")
        if fcntl is None or (_locked(handle) and partial.exists()):
            return partial, handle
        handle.close()  # somebody who cleans up saw it before it was locked


def _locked(handle: Any) -> bool:
    """Lock an open file if nobody else holds it; the lock ends with the process or when the file is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Put the folder's entries on disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
