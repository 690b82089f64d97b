"""Open conversational data sets with pictures, and say what is missing."""

from __future__ import annotations

import os
from typing import Any

from datasets import Dataset, Image, List, load_dataset
from datasets.exceptions import DatasetNotFoundError

from .sft_config import VisionSFTConfig

COLUMNS = ("messages", "images")
BUILT_IN = "scenes"
BUILT_IN_ROWS = {"train": 4000, "validation": 400, "test": 800}
BUILT_IN_PIXELS = 96


def open_rows(config: VisionSFTConfig) -> tuple[Dataset, Dataset | None]:
    """Open the rows to train and to validate on.

    Raises:
        ValueError: the data set, its configuration, a split or a column is missing.
    """
    train = _open(config, config.train_split, config.max_train_rows)
    if config.eval_strategy == "no" or config.eval_split is None:
        return train, None
    return train, _open(config, config.eval_split, config.max_eval_rows)


def _open(config: VisionSFTConfig, split: str, limit: int | None) -> Dataset:
    name = config.dataset
    if name.partition(":")[0] == BUILT_IN:
        return _scenes(name, config.dataset_config, split, limit)
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"dataset={name!r} is neither a folder, nor a Hub data set 'owner/name', nor {BUILT_IN}[:PIXELS]."
        )
    try:
        splits = load_dataset(name, config.dataset_config)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"dataset={name!r}, dataset_config={config.dataset_config!r}: {error}") from error
    if split not in splits:
        raise ValueError(f"dataset={name!r} has no split {split!r}; it has {', '.join(splits)}.")
    rows = splits[split]
    check_columns(rows, name)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def check_columns(rows: Dataset, name: str) -> None:
    """Check that a data set is conversational and has pictures.

    Raises:
        ValueError: a column is missing, `images` holds no pictures, or there are no rows.
    """
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset={name!r} has no column {' and no column '.join(map(repr, missing))}; it has "
            f"{', '.join(rows.column_names)}. Needed are messages (role, content) and images (a list of pictures)."
        )
    if rows.features["images"] != List(Image()):
        raise ValueError(f"dataset={name!r}: column 'images' is {rows.features['images']}; needed is a list of Image.")
    if not len(rows):
        raise ValueError(f"dataset={name!r} has no rows.")


def _scenes(name: str, config_name: str | None, split: str, limit: int | None) -> Dataset:
    """The sets that ``dualstream build spatial-sft`` writes, made in memory."""
    from dualstream.data_builders.spatial_sft import (
        NON_SPATIAL_FEATURES,
        WHATS_UP_FEATURES,
        non_spatial_row,
        split_range,
        whats_up_rows,
    )

    _, _, size = name.partition(":")
    if size and not size.isdecimal():
        raise ValueError(f"dataset={name!r}: after {BUILT_IN}: comes the side of the pictures in pixels.")
    pixels = int(size or BUILT_IN_PIXELS)
    count = BUILT_IN_ROWS.get(split, 0) if limit is None else limit
    rows: list[dict[str, Any]]
    if config_name in (None, "spatial"):
        rows = [row for seed in split_range(split, 0, -(-count // 4)) for row in whats_up_rows(seed, pixels)][:count]
        features = WHATS_UP_FEATURES
    elif config_name == "non_spatial":
        rows = [non_spatial_row(seed, pixels) for seed in split_range(split, 0, count)]
        features = NON_SPATIAL_FEATURES
    else:
        raise ValueError(f"dataset_config={config_name!r} is unknown for {BUILT_IN}; known are spatial, non_spatial.")
    return Dataset.from_list(rows, features=features)
