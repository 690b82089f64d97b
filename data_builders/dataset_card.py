"""The card of a dataset folder, made from its data: what the viewer needs, schema, counts, limits, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from datasets import Features

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class CardText:
    """What is said of a dataset in words; the rest of its card comes from the data.

    Attributes:
        title: heading.
        summary: what a row is, first paragraph.
        provenance: where the data come from.
        license: identifier of the Hub; ``other`` where several apply.
        tags: for the Hub's search.
        limits: what the data do not show, one entry each.
        sections: heading -> Markdown, between schema and provenance.
        task_categories: of the Hub.
    """

    title: str
    summary: str
    provenance: str
    license: str
    tags: Sequence[str] = ()
    limits: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    task_categories: Sequence[str] = ("visual-question-answering",)


def dataset_card(
    text: CardText,
    rows: Mapping[str, Mapping[str, int]],
    features: Mapping[str, Features],
    columns: Mapping[str, str],
    command: str,
) -> str:
    """Return the content of README.md for a folder in the layout of ``ShardFolder``.

    Args:
        text: what is said in words.
        rows: configuration -> split -> number of rows; the first configuration is the default.
        features: configuration -> typed columns.
        columns: column -> meaning, every column of every configuration.
        command: what built it, without folders of a machine.

    Raises:
        ValueError: a column has no meaning stated, or a meaning no column.
    """
    names = {name for config in features.values() for name in config}
    if names != set(columns):
        raise ValueError(f"columns and their meanings differ in {', '.join(sorted(names ^ set(columns)))}.")
    header = yaml.safe_dump(_header(text, rows, features), sort_keys=False, allow_unicode=True)
    limits = "\n".join(f"- {limit}" for limit in text.limits)
    parts = [
        f"---\n{header}---\n",
        f"# {text.title}\n",
        text.summary + "\n",
        _load_snippet(rows),
        "## Rows\n\n" + _count_table(rows),
        "## Columns\n\n" + _column_table(columns, features),
        *(f"## {heading}\n\n{body}\n" for heading, body in text.sections.items()),
        f"## Where it comes from\n\n{text.provenance}\n",
        *([f"## Limits\n\n{limits}\n"] if limits else []),
        f"Built by `{command}`. Settings, shards and their hashes: `manifest.json`.\n",
    ]
    return "\n".join(parts)


def _header(text: CardText, rows: Mapping[str, Mapping[str, int]], features: Mapping[str, Features]) -> dict[str, Any]:
    """The YAML that the Hub and its viewer read; number of rows are left to them, they count."""
    total = max(sum(splits.values()) for splits in rows.values())
    configs: list[dict[str, Any]] = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split, count in splits.items() if count],
        }
        for name, splits in rows.items()
    ]
    configs[0]["default"] = True
    return {
        "pretty_name": text.title,
        "license": text.license,
        "language": ["en"],
        "task_categories": list(text.task_categories),
        "tags": [*text.tags, "dualstream"],
        "size_categories": [next((name for limit, name in SIZES if total < limit), "1M<n<10M")],
        "configs": configs,
        "dataset_info": [{"config_name": name, "features": features[name]._to_yaml_list()} for name in rows],
    }


def _load_snippet(rows: Mapping[str, Mapping[str, int]]) -> str:
    config, splits = next(iter(rows.items()))
    split = next(split for split, count in splits.items() if count)
    return (
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("REPO_OR_FOLDER", "{config}", split="{split}")  # streaming=True works too\n'
        "print(rows[0])\n```\n"
    )


def _count_table(rows: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"| `{name}` | {split} | {count:,} |" for name, splits in rows.items() for split, count in splits.items()]
    return "\n".join(["| configuration | split | rows |", "|---|---|---|", *lines, ""])


def _column_table(columns: Mapping[str, str], features: Mapping[str, Features]) -> str:
    lines = []
    for name, meaning in columns.items():
        kinds = dict.fromkeys(type_name(config[name]) for config in features.values() if name in config)
        lines.append(f"| `{name}` | {' or '.join(kinds)} | {meaning} |")
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *lines, ""])


def type_name(feature: Any) -> str:
    """A feature type as a reader would write it, e.g. ``list of 4 int32``."""
    kind = type(feature).__name__
    if isinstance(feature, dict):
        return ", ".join(f"{name}: {type_name(inner)}" for name, inner in feature.items())
    if kind == "Value":
        return str(feature.dtype)
    if kind == "ClassLabel":
        names = feature.names
        return f"class label, {', '.join(names) if len(names) <= 8 else f'{len(names)} names'}"
    if kind in ("List", "LargeList"):
        length = getattr(feature, "length", -1)
        return f"list of {'' if length in (-1, None) else f'{length} '}{type_name(feature.feature)}"
    return kind.lower()
