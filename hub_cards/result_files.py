"""Result files of our commands as sections of a card: tables, ``model-index`` entries, and a check whose they are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.eval.result_tables import arm_metrics, arm_table, cell_table, kind_table, metric

from .card_subject import Subject

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

BESIDE = ("evaluation.json", "distillation.json", "sft.json", "training.json", "summary.json")

LONGEST_WORD = 60  # of a command that is shown


@dataclass(frozen=True)
class Section:
    """What one result file says.

    Attributes:
        title: heading.
        body: Markdown.
        metrics: entries for ``model-index``.
        units: independent units behind its figures.
        trained: whether it is about training, not about how good the result is.
    """

    title: str
    body: str
    metrics: list[EvalResult] = field(default_factory=list)
    units: int = 0
    trained: bool = False


def read_sections(subject: Subject, named: Sequence[Path]) -> list[Section]:
    """Read the result files that lie beside the model and those that are named.

    Args:
        subject: whose card is made.
        named: files, or folders with a ``summary.json``.

    Raises:
        ValueError: a named file is missing, a file is damaged or holds no results, or they are another model's.
    """
    paths = [subject.folder / name for name in BESIDE if (subject.folder / name).is_file()]
    for path in named:
        path = path / "summary.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"--results {path} is missing; a card shows only figures that a file stands for.")
        if path.resolve() not in [other.resolve() for other in paths]:
            paths.append(path)
    sections = [_read(subject, path) for path in paths]
    return sorted({section.body: section for section in sections}.values(), key=lambda section: section.trained)


def _read(subject: Subject, path: Path) -> Section:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for belongs, reader in _READERS:
            if belongs(content):
                return reader(subject, path, content)
    except _Foreign:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is damaged or no result file: {type(error).__name__} {error}") from error
    raise ValueError(
        f"{path} is no result file of dualstream; accepted are those of quiz, eval, decoders, train distill, train "
        "sft and the evaluation.json of an embedded model."
    )


class _Foreign(ValueError):
    """The results of another model."""


def _require(subject: Subject, path: Path, recorded: str, also_base: bool = False) -> None:
    if subject.is_called(recorded) or (also_base and recorded == subject.base):
        return
    raise _Foreign(
        f"{path} holds results of {recorded!r}, not of {subject.name!r}. If it is the same model under another name, "
        f"say --name {Path(recorded).name}."
    )


def _require_scaling(subject: Subject, path: Path, recorded: Any) -> None:
    """A figure measured under another RoPE than the checkpoint has is not the checkpoint's."""
    from dualstream.modeling import RopeScaling

    own = subject.config.get("vision_rope_scaling")
    if recorded and RopeScaling.from_any(recorded) != (RopeScaling.from_any(own) if own else None):
        shown = str(RopeScaling.from_any(recorded))
        raise _Foreign(
            f"{path} was measured with RoPE scaling {shown}, which the configuration of {subject.name} lacks."
        )


def _arms(subject: Subject, path: Path, content: dict[str, Any]) -> Section:
    """Of ``dualstream quiz``, or the ``evaluation.json`` of an embedded model."""
    manifest, arms = content["manifest"], content.get("arms") or content["summary"]
    _require(subject, path, manifest["model"])
    _require_scaling(subject, path, manifest.get("rope_scaling"))
    n = arms[0]["accuracy"]["n"]
    parts = [
        f"{n:,} held-out questions about drawn scenes ({manifest['split']} split), one per scene, greedy answers, "
        "exact match; 95 % intervals in brackets (Wilson; Agresti-Min for the paired difference; bootstrap).",
        kind_table(arms),
        arm_table(arms),
    ]
    if "cells" in content:
        parts += [
            cell_table(content["cells"]),
            "Readable: the likeliest token names the object's shape, colour or texture.",
        ]
    return Section("Scene questions", _with_command(parts, manifest), arm_metrics(arms, manifest["split"]), n)


def _suite(subject: Subject, path: Path, content: dict[str, Any]) -> Section:
    """Of ``dualstream eval``: the rows of this model and, for comparison, of its base."""
    from dualstream.eval.suites.report import group_tables

    manifest, rows = content["manifest"], content["summary"]
    own = [{**row, "model": subject.name} for row in rows if subject.is_called(row["model"])]
    if not own:
        _require(subject, path, ", ".join(dict.fromkeys(row["model"] for row in rows)))
    _require_scaling(subject, path, manifest.get("rope_scaling"))
    base = [{**row, "model": f"{row['model']}, for comparison"} for row in rows if row["model"] == subject.base]
    tasks = [row for row in own if row["task"] != "mean"]
    metrics = [
        metric(f"{label}, {row['arm']}", row[key], row["task"], dataset_type=row["task"])
        for row in tasks
        for key, label in (("accuracy", "accuracy"), ("pair", "pair accuracy"), ("set", "set accuracy"))
        if key in row
    ]
    if manifest.get("limit"):
        head = f"The first {manifest['limit']} items of every task. "
    else:
        head = "All items of every task. "
    parts = [f"{head}lmms-eval {manifest['lmms_eval']}.", group_tables(own + base).rstrip()]
    return Section("Benchmarks", _with_command(parts, manifest), metrics, max(row["accuracy"]["n"] for row in own))


def _decoders(subject: Subject, path: Path, content: dict[str, Any]) -> Section:
    """Of ``dualstream decoders``: this decoder among others."""
    from dualstream.eval.decoder_report import format_report

    manifest = content["manifest"]
    own = (subject.decoder or {}).get("training")
    if own is None or own not in manifest["decoders"].values():
        _require(subject, path, manifest["model"])
    body = [f"Measured on `{_plain(manifest['model'])}`.", f"```text\n{format_report(content)}\n```"]
    return Section("Visual decoders compared", _with_command(body, manifest))


def _distillation(subject: Subject, path: Path, content: dict[str, Any]) -> Section:
    """Of ``dualstream train distill``."""
    from dualstream.train.distill_card import figure_table

    record = content["decoder"]
    facts = (subject.decoder or {}).get("training")
    if not facts or any(record.get(name) != value for name, value in facts.items()):
        raise _Foreign(f"{path} is the record of another visual decoder than the one of {subject.name!r}.")
    n = content["figures"]["decoder"]["top1"]["n"]
    dataset = f"pictures, {content['measured_on']} split"
    metrics = [
        metric(label, content["figures"]["decoder"][key], dataset, metric_type=key, dataset_type="pictures")
        for key, label in (
            ("top1", "cells read as the language model reads them"),
            ("boundary_f1", "run boundaries, F1"),
        )
    ]
    parts = [
        f"A {record['kind']} decoder of {record['classes']:,} readings, {record['parameters']:,} parameters, "
        f"{record['multiply_adds_per_token']:,} multiply-adds per visual token, distilled from the language model's "
        f"own reading after {record['teacher_depth']} blocks. Agreement with that reading:",
        figure_table(content),
    ]
    return Section("Visual decoder", _with_command(parts, content["manifest"]), metrics, n)


def _fine_tuning(subject: Subject, path: Path, content: dict[str, Any]) -> Section:
    """Of ``dualstream train sft``."""
    from dualstream.train.sft_parts import PartRow, format_table

    manifest, record = content["manifest"], subject.training
    if not record or record["manifest"] != manifest:
        raise _Foreign(f"{path} is the record of another fine-tuning than the one of {subject.name!r}.")
    rows, settings = content["rows"], manifest["settings"]
    parts = [
        f"{content['steps']} steps on {rows['train']:,} rows of `{_plain(settings['dataset'])}`; learning rate "
        f"{settings['learning_rate']:g}, seed {manifest['seed']}.",
        f"```text\n{format_table([PartRow(**row) for row in content['trained']])}\n```",
    ]
    if content["validation"]:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in content["validation"].items())
        parts.append(
            f"Last validation, on {rows['validation']:,} rows: {figures}. Accuracies are of the likeliest token given "
            "all that is right before it; they are no test figures."
        )
    return Section("Training", _with_command(parts, manifest), trained=True)


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda content: all(name in content for name in names)


def _has_suite(content: dict[str, Any]) -> bool:
    return bool(content.get("summary")) and "task" in content["summary"][0]


_READERS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[Subject, Path, dict[str, Any]], Section]], ...] = (
    (_has("arms", "cells"), _arms),
    (_has_suite, _suite),
    (_has("summary", "manifest"), _arms),
    (_has("readers", "class_space"), _decoders),
    (_has("decoder", "figures", "measured_on"), _distillation),
    (_has("trained", "validation", "rows"), _fine_tuning),
)


def _with_command(parts: list[str], manifest: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    return "\n\n".join([*parts, f"`{portable(manifest['command'])}` ({versions})"])


def portable(command: str) -> str:
    """A command without the folders of the machine that ran it."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(_plain(word) for word in words)


def _plain(word: str) -> str:
    word = Path(word).name if word.startswith(("/", "~")) else word
    return word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 3]}..."
