"""What must be true of a folder before strangers get it. Every check looks at files; none trusts a name."""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .release_files import CARD, ReleaseFile

TEXT_ENDINGS = (".json", ".md", ".py", ".yaml", ".yml", ".txt", ".jinja", ".toml", ".cfg", ".jsonl", ".html", ".svg")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".dill")
MAX_TEXT_BYTES = 20_000_000
MAX_FILE_BYTES = 50_000_000_000  # what the Hub takes
LARGE_FILE_BYTES = 5_000_000_000  # what it recommends at most
_ABSOLUTE = re.compile(
    r"(?<![\w:/.~<])/(?:home|root|tmp|Users|mnt|media|opt|var|srv|scratch|workspace|work|data\d*|content|kaggle)/[\w.@+~-]+"
    r"|\b[A-Za-z]:\\\\?[\w]|file://"
)
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an API key": re.compile(r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\bhttps?://[^/\s:@]+:[^/\s:@]+@"),
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with a release.

    Attributes:
        file: which file, "." for the whole.
        message: what is wrong and what to do.
        refused: whether it stops the release; otherwise it is a warning.
    """

    file: str
    message: str
    refused: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields."""
        return asdict(self)


Check = Callable[[Sequence[ReleaseFile]], Iterator[Problem]]


def check_sizes(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """No file that the Hub does not take; nothing half-written."""
    for file in files:
        if file.name.endswith((".partial", ".incomplete", ".tmp", ".lock")):
            yield Problem(file.name, "is left over from an unfinished write; delete it or finish the run.")
        if file.size > MAX_FILE_BYTES:
            yield Problem(
                file.name, f"has {file.size:,} bytes; the Hub takes files up to {MAX_FILE_BYTES:,}. Shard it."
            )
        elif file.size > LARGE_FILE_BYTES:
            yield Problem(file.name, f"has {file.size:,} bytes; shards of 5 GB load better.", refused=False)
        elif file.size == 0 and not file.name.endswith("__init__.py"):
            yield Problem(file.name, "is empty.")


def check_no_pickle(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """No file that runs code when it is opened, by name or by content."""
    for file in files:
        if file.name.lower().endswith(PICKLE_ENDINGS):
            yield Problem(file.name, "may run code when it is loaded; save weights as safetensors.")
            continue
        with file.path.open("rb") as handle:
            head = handle.read(4096)
        is_pickle = len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5
        if is_pickle or (head[:2] == b"PK" and b"data.pkl" in head):
            yield Problem(file.name, "holds a pickle whatever its name; save weights as safetensors.")


def check_safetensors(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """Every safetensors file is whole, and an index names the files and tensors that are there."""
    tensors: dict[str, set[str]] = {}
    for file in files:
        if file.name.endswith(".safetensors"):
            try:
                tensors[file.name] = set(safetensors_header(file.path)) - {"__metadata__"}
            except ValueError as error:
                yield Problem(file.name, str(error))
    for file in files:
        if file.name.endswith(".safetensors.index.json"):
            weight_map = _json(file).get("weight_map", {})
            for shard in sorted(set(weight_map.values()) - set(tensors)):
                yield Problem(file.name, f"names {shard}, which is not there.")
            for name, shard in sorted(weight_map.items()):
                if shard in tensors and name not in tensors[shard]:
                    yield Problem(file.name, f"says that {shard} holds {name}; it does not.")
                    break


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file.

    Raises:
        ValueError: the file is cut short or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise ValueError("is no safetensors file, or is cut short.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError("is no safetensors file: its header is no JSON.") from error
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ValueError(f"should have {8 + length + end:,} bytes and has {size:,}; it is cut short or damaged.")
    return header


def check_texts(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """No folder of a machine and no secret in any text."""
    for file in files:
        if not file.name.endswith(TEXT_ENDINGS) or file.size > MAX_TEXT_BYTES:
            continue
        text = file.content().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            for what, pattern in _SECRETS.items():
                if pattern.search(line):
                    yield Problem(file.name, f"line {number} holds what looks like {what}.")
            found = _ABSOLUTE.search(line)
            if found:
                yield Problem(file.name, f"line {number} names a place on one machine: {found.group()[:60]!r}.")


def check_json(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """Every JSON file is JSON, and no value of a configuration is an absolute path."""
    for file in files:
        if not file.name.endswith(".json") or file.size > MAX_TEXT_BYTES:
            continue
        try:
            values = json.loads(file.content())
        except ValueError as error:
            yield Problem(file.name, f"is no JSON: {error}.")
            continue
        if file.name.endswith("config.json"):
            for key, value in _strings(values):
                if "path" in key and Path(value).is_absolute():
                    yield Problem(file.name, f"{key} is {value!r}, a place on one machine.")


def check_code(files: Sequence[ReleaseFile]) -> Iterator[Problem]:
    """The Python files are complete: every relative import is there, and nothing needs this package."""
    names = {file.name for file in files}
    modules = {name for name in names if name.endswith(".py") and "/" not in name}
    for file in files:
        if file.name in modules:
            yield from _check_imports(file, modules)
        if file.name.endswith("config.json"):
            auto_map = _json(file).get("auto_map", {})
            entries = [
                entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])
            ]
            for module in sorted({entry.split("--")[-1].split(".")[0] for entry in entries if entry}):
                if f"{module}.py" not in names:
                    yield Problem(file.name, f"auto_map names {module}.py, which is not there.")


def _check_imports(file: ReleaseFile, modules: set[str]) -> Iterator[Problem]:
    try:
        tree = ast.parse(file.content())
    except SyntaxError as error:
        yield Problem(file.name, f"is no Python: {error}.")
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or f"{(node.module or '').split('.')[0]}.py" not in modules:
                yield Problem(file.name, f"imports {'.' * node.level}{node.module or ''}, which is not in the folder.")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in found:
                if name.split(".")[0] == "dualstream":
                    yield Problem(file.name, "imports dualstream, which who loads this has not installed.")


def check_card(files: Sequence[ReleaseFile], metadata: Sequence[str] = ("license", "tags")) -> Iterator[Problem]:
    """The card is there, has the metadata that people search by, and every file that it shows exists."""
    card = next((file for file in files if file.name == CARD), None)
    if card is None:
        yield Problem(CARD, "is missing; a release needs a card.")
        return
    from huggingface_hub import RepoCard

    text = card.content().decode("utf-8", errors="replace")
    try:
        values = RepoCard(text, ignore_metadata_errors=False).data.to_dict()
    except ValueError as error:
        yield Problem(CARD, f"its metadata cannot be read: {error}")
        return
    for name in metadata:
        if not values.get(name):
            yield Problem(CARD, f"its metadata lacks {name}.")
    for word in ("TODO", "[More Information Needed]", "REPO_OR_FOLDER", "licence: license"):
        if word in text:
            yield Problem(CARD, f"still says {word!r}.")
    names = {file.name for file in files}
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", text):
        path = target.split("#")[0].removeprefix("./")
        if path and path not in names:
            yield Problem(CARD, f"points at {target}, which is not in the folder.")
    base = values.get("base_model")
    for model in [base] if isinstance(base, str) else base or []:
        if model.startswith((".", "/")) or model.count("/") > 1:
            yield Problem(CARD, f"base_model {model!r} is no repository of the Hub.")


def _json(file: ReleaseFile) -> dict[str, Any]:
    try:
        values = json.loads(file.content())
    except ValueError:
        return {}  # check_json says so
    return values if isinstance(values, dict) else {}


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


EVERYTHING: tuple[Check, ...] = (check_sizes, check_no_pickle, check_texts, check_json, check_card)
