"""Parquet shards that survive a kill: each is written atomically and not made twice under the same settings."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm import tqdm

MANIFEST = "manifest.json"
ROW_GROUP = 100  # rows that are decoded together when one is asked for


class ShardFolder:
    """A data set folder that is being written: ``CONFIG/SPLIT-XXXXX-of-XXXXX.parquet`` and ``manifest.json``.

    Args:
        folder: where; created if missing.
        settings: everything the rows depend on, JSON-serialisable.

    Raises:
        ValueError: the folder holds data that was made with other settings, or something else altogether.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        settings = json.loads(json.dumps(settings))
        if self.path.is_file():
            self.manifest = json.loads(self.path.read_text(encoding="utf-8"))
            self._require_same(settings)
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no {MANIFEST}; choose a new folder.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.manifest = {"settings": settings, "shards": {}}
            self.save()

    def write(
        self, config: str, split: str, units: int, rows_of: Callable[[int, int], Iterable[dict]], features: Features,
        shard_units: int,
    ) -> int:  # fmt: skip
        """Write one split of one configuration.

        Args:
            config: name of the configuration, its folder.
            split: name of the split.
            units: how many units of work the split has (sets of pictures, questions).
            rows_of: the rows of the units from a first one up to, not including, a last one.
            features: the typed columns.
            shard_units: units per shard.

        Returns:
            Number of rows.
        """
        (self.folder / config).mkdir(exist_ok=True)
        count, total = math.ceil(units / shard_units), 0
        with tqdm(total=units, desc=f"{config} {split}", disable=None) as progress:
            for index in range(count):
                start, stop = index * shard_units, min(units, (index + 1) * shard_units)
                name = f"{config}/{split}-{index:05d}-of-{count:05d}.parquet"
                if not self._finished(name):
                    self._write_shard(name, list(rows_of(start, stop)), features)
                total += self.manifest["shards"][name]["rows"]
                progress.update(stop - start)
        return total

    def save(self, **facts: Any) -> None:
        """Write the manifest, with further facts."""
        self.manifest |= facts
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def _finished(self, name: str) -> bool:
        return name in self.manifest["shards"] and (self.folder / name).is_file()

    def _write_shard(self, name: str, rows: list[dict], features: Features) -> None:
        target = self.folder / name
        partial = target.with_suffix(".partial")
        # The schema carries the feature types, so that `load_dataset` gives pictures back as pictures.
        encoded = [features.encode_example(row) for row in rows]
        table = pa.Table.from_pylist(encoded, schema=features.arrow_schema)
        pq.write_table(table, partial, compression="zstd", row_group_size=ROW_GROUP, write_page_index=True)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        os.replace(partial, target)
        self.manifest["shards"][name] = {"rows": len(rows), "sha256": digest}
        self.save()

    def _require_same(self, settings: dict[str, Any]) -> None:
        stored = self.manifest.get("settings") or {}
        different = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
        if different:
            shown = "; ".join(f"{n}: {stored.get(n)!r} there, {settings.get(n)!r} asked for" for n in different)
            raise ValueError(
                f"--out {self.folder} holds a data set with other settings ({shown}); choose a new folder."
            )
