"""Items of VSR: is a statement about a picture true?"""

from __future__ import annotations

from pathlib import Path

from .data_folder import check_count, read_json
from .items import Item

OPTIONS = ("True", "False")


def read_statements(task: str, path: Path) -> list[Item]:
    """Items of an annotation file of VSR, one per line.

    Raises:
        ValueError: the file is cut short, of the wrong length, or a row has no picture, statement or label.
    """
    rows = read_json(path)
    check_count(task, len(rows), path)
    items = []
    for number, row in enumerate(rows):
        try:
            image, statement, label = row["image"], row["caption"], int(row["label"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{task}, row {number}: {error} in {row!r}.") from None
        if label not in (0, 1):
            raise ValueError(f"{task}, row {number}: label is {label}; accepted are 0 and 1.")
        items.append(Item(f"{task}-{number}", image, OPTIONS, 1 - label, question=statement))
    return items
