"""Rows of an experiment, one Parquet file per unit of work: what has a file is not computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from dualstream.data_builders.token_maps.atomic import atomic_file, remove_orphans
from dualstream.train.run_folder import claim_folder

ROWS = "rows"
LONGEST_STEM = 150  # characters of a file name before it is cut and given a hash; file systems allow 255 bytes


class ResumableRows:
    """The rows of one run, in a folder.

    Every unit (an image, a pair, a setting) is written as a whole or not at all, so a killed run that is started
    again computes only what is missing, and the table that comes out is the same.

    Args:
        folder: of the run; made if it is missing. Units lie in ``FOLDER/rows/``, settings in
            ``FOLDER/configuration.json``; other files in the folder are the caller's.
        settings: what identifies the run, JSON-serialisable: model, data, options, seed.

    Raises:
        ValueError: the folder holds a run of other settings, or files of something else.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        claim_folder(self.folder, settings)
        self.rows_folder = self.folder / ROWS
        self.rows_folder.mkdir(exist_ok=True)
        remove_orphans(self.rows_folder)

    def path(self, unit: str) -> Path:
        """The file of a unit."""
        return self.rows_folder / f"{_stem(unit)}.parquet"

    def __contains__(self, unit: str) -> bool:
        """Whether a unit is done."""
        return self.path(unit).is_file()

    @property
    def done(self) -> set[str]:
        """Names of the units that are finished."""
        return {_unit_of(path) for path in self.rows_folder.glob("*.parquet")}

    def write(self, unit: str, rows: Sequence[dict[str, Any]] | pa.Table) -> None:
        """Write the rows of a unit, all at once; no rows are an answer, too.

        Args:
            unit: its name, any text; written again, it is replaced.
            rows: all units of a run have the same columns.
        """
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
        metadata = {**(table.schema.metadata or {}), b"unit": unit.encode()}
        with atomic_file(self.path(unit)) as file:
            pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")

    def read(self, unit: str) -> pa.Table:
        """Rows of one finished unit, with the metadata they were written with and its name as ``unit``."""
        return pq.read_table(self.path(unit))

    def table(self, units: Sequence[str] | None = None, columns: list[str] | None = None) -> pa.Table:
        """All rows of the run, or those of some units.

        Args:
            units: in this order; None: all that are done, sorted by name.
            columns: those to read; None: all.

        Returns:
            One table; without columns if no unit has rows.
        """
        names = sorted(self.done) if units is None else units
        tables = [pq.read_table(self.path(unit), columns=columns).replace_schema_metadata(None) for unit in names]
        tables = [table for table in tables if table.num_columns]
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def _stem(unit: str) -> str:
    stem = quote(unit, safe=" ,=+").replace(".", "%2E")
    if len(stem) <= LONGEST_STEM:
        return stem
    return f"{stem[:LONGEST_STEM]}~{hashlib.sha256(unit.encode()).hexdigest()[:12]}"


def _unit_of(path: Path) -> str:
    return (pq.read_schema(path).metadata or {})[b"unit"].decode()
