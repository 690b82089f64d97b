"""A record of every sample, beside the results of the harness."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .runner import Cost

FOLDER = "records"


class SampleRecords:
    """Rows that say what every request cost, in memory and in a JSON Lines file.

    A request is found again by task, doc_id, idx (its place among the requests of the document), repeat and rank.

    Attributes:
        rows: all rows since the last ``clear``.
        path: the file, None to write none.

    Args:
        folder: where to write ``<UTC time>_rank<rank>.jsonl``; made when the first row comes.
        rank: of this process.
    """

    def __init__(self, folder: str | Path | None = None, rank: int = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rank = rank
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-%f")
        self.path = Path(folder) / f"{time}_rank{rank}.jsonl" if folder is not None else None
        self._seen: Counter[tuple[Any, ...]] = Counter()

    def start(self) -> None:
        """Begin to count the repeats of requests anew: once for every call of the harness."""
        self._seen.clear()

    def repeat(self, *request: Any) -> int:
        """How often this request (task, doc_id, idx) has come before since ``start``."""
        self._seen[request] += 1
        return self._seen[request] - 1

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and write them at once."""
        self.rows += rows
        if self.path is not None and rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def clear(self) -> None:
        """Forget the rows in memory."""
        self.rows = []


def cost_fields(cost: Cost) -> dict[str, Any]:
    """The columns of a record that say what an answer cost."""
    return {
        "visual_tokens": cost.prompt.visual,
        "kept_tokens": cost.prompt.kept,
        "prompt_tokens": cost.prompt.total,
        "new_tokens": cost.new_tokens,
        "kv_bytes": cost.kv_bytes,
        "seconds": cost.seconds,
        "batch_size": cost.batch_size,
    }


def folder_beside_results(argv: Sequence[str]) -> Path | None:
    """``records`` in the folder that a command line of the harness names as ``--output_path``, None without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_path")
    path = parser.parse_known_args([word for word in argv if word != "--"])[0].output_path
    return Path(path) / FOLDER if path else None
