"""The folder of a corpus: its configuration, its shards, and which of them are finished.

    data/CONFIG/SPLIT-00003.parquet   shard 3 at one depth; one file per depth
    .build/configuration.json         what every shard was made with
    .build/shard-00003.json           written last: shard 3 is finished, with these files
    .build/end.json                   number of pictures of the source, once it is known

A shard covers a fixed range of positions of the source, so that every process agrees on what belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import atomic_file, read_json, remove_orphans, write_json
from .depths import Depth, config_name

METADATA_KEY = b"dualstream"
ROW_GROUP = 256


class CorpusFolder:
    """The files of one corpus.

    Args:
        path: the folder; made if absent.
        configuration: JSON values that decide every row.
        split: name of the split.

    Raises:
        ValueError: if the folder holds another corpus, or files that are no corpus.
    """

    def __init__(self, path: Path, configuration: dict[str, Any], split: str) -> None:
        self.path, self.split = path, split
        self.configuration = json.loads(json.dumps(configuration))
        self.depths: list[Depth] = self.configuration["depths"]
        self.rows_per_shard: int = self.configuration["rows_per_shard"]
        self.digest = configuration_sha256(self.configuration)
        self._settle()
        self.orphans = remove_orphans(path)

    def file(self, shard: int, depth: Depth) -> Path:
        """Path of a shard at one depth."""
        return self.path / "data" / config_name(depth) / f"{self.split}-{shard:05d}.parquet"

    def record_file(self, shard: int) -> Path:
        """Path of the record that says a shard is finished."""
        return self.path / ".build" / f"shard-{shard:05d}.json"

    def write(
        self, shard: int, tables: Iterable[tuple[Depth, pa.Table]], rejects: list[dict[str, Any]], source: str
    ) -> None:
        """Write a shard: first its files, then the record that makes it count.

        Args:
            shard: number of the shard.
            tables: depth and rows of every file, with equal numbers of rows; taken one at a time.
            rejects: pictures of the shard's range that could not be read.
            source: hash of what the shard was made from.
        """
        files: dict[str, dict[str, Any]] = {}
        for depth, table in tables:
            path = self.file(shard, depth)
            write_parquet(path, table, {"configuration_sha256": self.digest, "shard": shard})
            relative = path.relative_to(self.path).as_posix()
            files[relative] = {"rows": len(table), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        images = next(iter(files.values()))["rows"]
        record = {"shard": shard, "configuration_sha256": self.digest, "images": images, "source_sha256": source}
        write_json(self.record_file(shard), {**record, "rejects": rejects, "files": files})

    def record(self, shard: int, deep: bool = False) -> dict[str, Any] | None:
        """Return the record of a finished shard after checking its files, None if it has to be made (again).

        Args:
            shard: number of the shard.
            deep: also hash the files; otherwise their sizes, row counts and configuration are checked.
        """
        record = read_json(self.record_file(shard))
        if record is None or record["configuration_sha256"] != self.digest:
            return None
        expected = {self.file(shard, depth).relative_to(self.path).as_posix() for depth in self.depths}
        whole = record["files"].keys() == expected and all(
            self._is_whole(self.path / name, facts, deep) for name, facts in record["files"].items()
        )
        return record if whole else None

    @property
    def count(self) -> int | None:
        """Number of pictures of the source, None while nobody knows."""
        end = read_json(self.path / ".build" / "end.json")
        return None if end is None else end["images"]

    def set_count(self, count: int) -> None:
        """Note the number of pictures of the source."""
        if self.count != count:
            write_json(self.path / ".build" / "end.json", {"images": count})

    @property
    def num_shards(self) -> int | None:
        """Number of shards of the whole corpus, None while nobody knows."""
        return None if self.count is None else -(-self.count // self.rows_per_shard)

    def missing(self) -> list[int] | None:
        """Return the shards that are not finished, by their records alone; None while their number is unknown."""
        if self.num_shards is None:
            return None
        return [shard for shard in range(self.num_shards) if not self.record_file(shard).exists()]

    def records(self, deep: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the checked records of all shards in order.

        Raises:
            ValueError: if a shard is not finished or its files are not what its record says.
        """
        for shard in range(self.num_shards or 0):
            record = self.record(shard, deep)
            if record is None:
                raise ValueError(
                    f"shard {shard} of {self.path} is not finished, or its files were changed: run the build again."
                )
            yield record

    def _is_whole(self, path: Path, facts: dict[str, Any], deep: bool) -> bool:
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
        try:
            metadata = pq.read_metadata(path)
            note = json.loads(metadata.metadata[METADATA_KEY])
        except (pa.ArrowInvalid, KeyError, TypeError):
            return False
        fits = metadata.num_rows == facts["rows"] and note["configuration_sha256"] == self.digest
        return fits and (not deep or file_sha256(path) == facts["sha256"])

    def _settle(self) -> None:
        """Write the configuration of a new corpus, or check that of the one that is there."""
        place = self.path / ".build" / "configuration.json"
        found = read_json(place)
        if found is None:
            strangers = [entry.name for entry in _entries(self.path) if entry.name != ".build"]
            if strangers:
                raise ValueError(
                    f"out={self.path} holds other files ({', '.join(sorted(strangers)[:3])}) and no corpus; "
                    "give an empty or a new folder."
                )
            found = self._publish(place)
        if found != self.configuration:
            raise ValueError(
                f"out={self.path} holds a corpus of another configuration: {_differences(found, self.configuration)}; "
                "repeat the options it was begun with, or give another folder."
            )

    def _publish(self, place: Path) -> Any:
        """Write the configuration unless another process was faster; return the one that holds."""
        mine = place.with_name(f".configuration-{secrets.token_hex(4)}.json")
        write_json(mine, self.configuration)
        try:
            os.link(mine, place)  # unlike a replacement, fails if another process was faster
        except OSError:  # or if the file system knows no links
            if not place.exists():
                write_json(place, self.configuration)
        finally:
            mine.unlink()
        return read_json(place)


def write_parquet(path: Path, table: pa.Table, note: dict[str, Any]) -> None:
    """Write a table atomically, compressed, with content-defined chunks and a page index.

    Args:
        path: final name.
        table: the rows.
        note: JSON values for the file's metadata.
    """
    schema = table.schema.with_metadata({**(table.schema.metadata or {}), METADATA_KEY: json.dumps(note).encode()})
    options: dict[str, Any] = {"use_content_defined_chunking": True, "write_page_index": True}
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd", **options) as writer:
        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=ROW_GROUP)


def configuration_sha256(configuration: dict[str, Any]) -> str:
    """SHA-256 (hex) of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    """Name the options that differ, with both values."""
    found = found if isinstance(found, dict) else {}
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)
