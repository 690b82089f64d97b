"""What a run of ``dualstream bench`` leaves behind: one small JSON file that the report is rendered from."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualstream.data_builders.token_maps.atomic import atomic_file

from .machine import describe_machine, describe_versions, load_average, revision

FORMAT = 1
SUFFIX, UNFINISHED = ".json", ".unfinished.json"
# Measured under other values of these, rows do not belong into one record.
IDENTITY = ("shape", "settings", "machine", "versions")

Row = dict[str, Any]


@dataclass
class Record:
    """One run: what ran where, and its rows.

    Attributes:
        name: of its file, without ending.
        command: that makes it again.
        date: of its start, UTC.
        machine: see ``machine.describe_machine``.
        versions: see ``machine.describe_versions``.
        shape: see ``machine.describe_model``; None for a run that measures no model.
        settings: options of the run.
        suites: finished suites by name: ``date``, ``seconds``, ``load_before``, ``load_after`` and ``revision``.
        rows: plain JSON values, each with its ``suite``.
        format: of the file.
    """

    name: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    shape: dict[str, Any] | None
    settings: dict[str, Any]
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    format: int = FORMAT

    def of(self, suite: str) -> list[Row]:
        """Rows of a suite."""
        return [row for row in self.rows if row["suite"] == suite]


def save(record: Record, path: Path) -> None:
    """Write a record, whole or not at all.

    Raises:
        ValueError: it holds a value that JSON does not have, such as NaN or an array.
    """
    try:
        text = _text(asdict(record))
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {record.name} holds a value that is not plain, finite JSON: {error}") from error
    with atomic_file(path) as file:
        file.write((text + "\n").encode())


def _text(values: dict[str, Any]) -> str:
    """JSON with a line per row, so that files stay small and differences between them readable."""
    options: Any = {"ensure_ascii": False, "allow_nan": False}
    rows = ",\n".join(json.dumps(row, **options) for row in values.pop("rows"))
    return json.dumps({**values, "rows": []}, indent=1, **options).removesuffix("[]\n}") + f"[\n{rows}\n]\n}}"


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: the file is no record, is cut off, or has another format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not complete JSON ({error}); delete it and run its command again") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path.name} has format {found!r}, this version reads format {FORMAT}; measure it again")
    names = {item.name for item in fields(Record)}
    if names != set(values):
        odd = ", ".join(sorted(names ^ set(values)))
        raise ValueError(f"{path.name} is no record of `dualstream bench`: fields missing or unknown: {odd}")
    bad = [row for row in values["rows"] if row.get("suite") not in values["suites"]]
    if bad:
        raise ValueError(f"{path.name} has {len(bad)} rows of no suite it lists ({', '.join(values['suites'])})")
    return Record(**values)


def load_folder(folder: Path) -> tuple[list[Record], list[Record]]:
    """Read all records of a folder, sorted by name: finished ones, and those of runs that were stopped half-way.

    Raises:
        ValueError: there is no such folder, or see ``load``.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist; `dualstream bench --out {folder}` makes it")
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    finished = [load(path) for path in paths if not path.name.endswith(UNFINISHED)]
    return finished, [load(path) for path in paths if path.name.endswith(UNFINISHED)]


def rounded(value: Any) -> Any:
    """Return plain values with numbers cut to six significant digits, far below any spread; files stay small."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def command_line(words: Sequence[str] | None = None) -> str:
    """Return the command that is running, without folders of this machine.

    Args:
        words: as in ``sys.argv``, which is taken if None.
    """
    program, *options = sys.argv if words is None else words
    shown = [Path(word).name if os.path.isabs(word) else word for word in options]
    return shlex.join([Path(program).name, *shown])


class RunLog:
    """The record of a run while it runs.

    Every suite is saved when it is done, under a name that says that the run is unfinished. Only a finished run takes
    the final name, and replaces what had it. Started again, a run goes on after the suites that are there.

    Args:
        folder: of the records; made if it is missing.
        name: of the record.
        command: see ``command_line``.
        shape: see ``machine.describe_model``; None if no model is measured.
        settings: options that decide what is measured.
        restart: forget what an earlier run left unfinished.

    Raises:
        ValueError: an unfinished run of that name had another shape, settings, machine or versions.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        command: str,
        shape: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.folder, self.name = Path(folder), name
        self._partial = self.folder / f"{name}{UNFINISHED}"
        new = Record(
            name,
            command,
            _now(),
            describe_machine(),
            describe_versions(),
            None if shape is None else dict(shape),
            dict(settings or {}),
        )
        if restart:
            self._partial.unlink(missing_ok=True)
        self.record = self._resumed(new) if self._partial.is_file() else new
        self._start_suite()

    def done(self, suite: str) -> bool:
        """Whether a suite is measured."""
        return suite in self.record.suites

    def add(self, suite: str, rows: Sequence[Row]) -> None:
        """Save the rows of a finished suite, with its time since the last one and how busy the machine was.

        Raises:
            ValueError: the suite is there already, a row says it is of another suite, or see ``save``.
        """
        if suite in self.record.suites:
            raise ValueError(f"suite={suite!r} is already in the record {self.name}")
        odd = {row["suite"] for row in rows if row.get("suite", suite) != suite}
        if odd:
            raise ValueError(f"suite={suite!r} got rows of {', '.join(map(repr, sorted(odd)))}")
        self.record.rows += [rounded({"suite": suite, **row}) for row in rows]
        self.record.suites[suite] = {
            "date": self._date,
            "seconds": round(time.monotonic() - self._began, 1),
            "load_before": self._load,
            "load_after": load_average(),
            "revision": revision(),
        }
        save(self.record, self._partial)
        self._start_suite()

    def finish(self) -> Path:
        """Give the record its final name, in the place of an older one.

        Raises:
            ValueError: no suite was measured.
        """
        if not self.record.suites:
            raise ValueError(f"the run {self.name} has measured no suite")
        final = self.folder / f"{self.name}{SUFFIX}"
        os.replace(self._partial, final)
        return final

    def _resumed(self, new: Record) -> Record:
        old = load(self._partial)
        for part in IDENTITY:
            before, now = getattr(old, part), getattr(new, part)
            if before != json.loads(json.dumps(now)):
                raise ValueError(
                    f"{self._partial.name} is of a run with another {part}: {_difference(before, now)}; "
                    "start over (--restart), or go on as it began"
                )
        return old

    def _start_suite(self) -> None:
        self._began, self._date, self._load = time.monotonic(), _now(), load_average()


def _difference(before: Any, now: Any) -> str:
    """Name what differs, value by value where both have names."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before!r} before, {now!r} now"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}={before.get(name)!r} before, {now.get(name)!r} now" for name in names)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
