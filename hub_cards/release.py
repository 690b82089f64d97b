"""``dualstream release``: a checkpoint, a dataset or a Space folder becomes a Hub repository, after checks.

One commit holds everything, then a tag. A release that was cut off is started again with the same command: large files
that are already there are not sent again. A release that changes nothing makes no commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream import __version__
from dualstream.cli import Result

from .release_checks import EVERYTHING, Check, Problem, check_card, check_code, check_safetensors
from .release_files import CARD, ReleaseFile, list_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KINDS = ("model", "dataset", "space")
LOAD_SECONDS = 600
_CARD_FIELDS = {
    "model": ("license", "library_name", "tags"),
    "dataset": ("license", "tags", "configs"),
    "space": ("title", "sdk", "app_file"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder to release")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and show what would go up, send nothing"
    )
    parser.add_argument("--tag", default=f"v{__version__}", help="revision that the card pins (default: %(default)s)")
    parser.add_argument("--message", default=None, help="of the commit (default: Release TAG)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--no-load", action="store_true", help="skip loading the folder in a fresh process without dualstream"
    )
    parser.epilog = "The token is that of `hf auth login` or of the environment variable HF_TOKEN."


def run(args: argparse.Namespace) -> Result:
    """Check, then upload in one commit and tag it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise ValueError(f"REPO_ID {args.repo_id!r}: {error}") from error
    if args.repo_id.count("/") != 1:
        raise ValueError(f"REPO_ID {args.repo_id!r} must be OWNER/NAME.")
    files = list_files(args.path, args.repo_id, args.tag)
    problems = check(args.kind, files)
    loaded: dict[str, Any] | None = None
    if not args.no_load and args.kind != "space" and not any(problem.refused for problem in problems):
        loaded, more = check_loading(args.kind, args.path)
        problems += more
    if any(problem.refused for problem in problems):
        return Result(_payload(args, files, problems, loaded), _refusal(problems), ok=False)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        remote: dict[str, str] | None = remote_hashes(api, args.kind, args.repo_id)
    except ConnectionError as error:
        if not args.dry_run:
            raise
        remote, problems = None, [*problems, Problem(".", f"{error}; what is there now is not known.", refused=False)]
    payload = _payload(args, files, problems, loaded) | {"files": describe(files, remote)}
    payload["deleted"] = sorted(set(remote or ()) - {file.name for file in files} - {".gitattributes"})
    if not args.dry_run:
        payload |= upload(api, args, files, payload["deleted"])
    return Result(payload, _summary(payload))


def check(kind: str, files: Sequence[ReleaseFile]) -> list[Problem]:
    """All problems of a folder that can be seen without loading it.

    Args:
        kind: model, dataset or space.
        files: of the release.
    """
    checks: list[Check] = [check for check in EVERYTHING if check is not check_card]
    checks.append(partial(check_card, metadata=_CARD_FIELDS[kind]))
    if kind == "model":
        checks += [check_safetensors, check_code]
    return [problem for one in checks for problem in one(files)]


def check_loading(kind: str, folder: Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Load a folder in a fresh process that cannot import dualstream and sees no network.

    Returns:
        What the process found, None if it failed; the problems.
    """
    if kind == "model" and not (folder / "config.json").is_file():
        return None, _check_small_repository(folder)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": f"{scratch}/modules",
        }
        command = [sys.executable, str(Path(__file__).with_name("load_check.py")), kind, str(folder.resolve())]
        try:
            child = subprocess.run(
                command,
                env=environment,
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=LOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, [Problem(".", f"did not load within {LOAD_SECONDS} seconds.")]
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1] if child.stderr.strip() else f"exit status {child.returncode}"
        return None, [Problem(".", f"does not load where dualstream is not installed: {reason}")]
    found = json.loads(child.stdout.splitlines()[-1])
    lost = [f"{name}: {', '.join(found[name][:5])}" for name in found if name.endswith("_keys") and found[name]]
    return found, [Problem("config.json", f"weights and model differ, {'; '.join(lost)}.")] if lost else []


def _check_small_repository(folder: Path) -> list[Problem]:
    """A folder without a model must be a decoder or an adapter, and name the model it belongs to."""
    if (folder / "visual_decoder.json").is_file():
        from dualstream.modeling import VisualDecoder

        try:
            VisualDecoder.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            return [Problem("visual_decoder.json", f"the decoder does not load: {error}")]
        return []
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
        if base.count("/") != 1 or base.startswith((".", "/")):
            return [Problem(adapter.name, f"base_model_name_or_path is {base!r}; a Hub id is needed.")]
        return []
    return [Problem(".", "holds no config.json, visual_decoder.json or adapter_config.json: nothing to load.")]


def remote_hashes(api: HfApi, kind: str, repo_id: str) -> dict[str, str]:
    """File -> hash of what the repository holds now; empty if there is none or it is not for us to see.

    Raises:
        ConnectionError: the Hub cannot be asked.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        api.repo_info(repo_id, repo_type=kind)  # fails at once where the listing below would try again for long
        entries = list(api.list_repo_tree(repo_id, recursive=True, repo_type=kind))
    except RepositoryNotFoundError:
        return {}
    except HfHubHTTPError:
        raise
    except Exception as error:  # the HTTP library's own classes, which differ between versions of huggingface_hub
        raise ConnectionError(f"{api.endpoint} cannot be reached: {error}") from error
    files = [entry for entry in entries if hasattr(entry, "blob_id")]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def describe(files: Sequence[ReleaseFile], remote: dict[str, str] | None) -> list[dict[str, Any]]:
    """What would go up: name, bytes, SHA-256, and whether it is new, changed or the same as what is there."""
    rows = []
    for file in files:
        rows.append({"file": file.name, "bytes": file.size, "sha256": file.sha256, "state": _state(file, remote)})
    return rows


def _state(file: ReleaseFile, remote: dict[str, str] | None) -> str:
    if remote is None:
        return "unknown"
    there = remote.get(file.name)
    if there is None:
        return "new"
    return "same" if there == (file.sha256 if len(there) == 64 else file.git_hash) else "changed"


def upload(
    api: HfApi, args: argparse.Namespace, files: Sequence[ReleaseFile], deleted: Sequence[str]
) -> dict[str, Any]:
    """Send everything as one commit and tag it.

    Raises:
        ValueError: the tag exists and stands for other content.
        ConnectionError: an upload broke off.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    sdk = _space_sdk(files) if args.kind == "space" else None
    api.create_repo(args.repo_id, repo_type=args.kind, private=args.private or None, exist_ok=True, space_sdk=sdk)
    before = api.repo_info(args.repo_id, repo_type=args.kind).sha
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(args.repo_id, repo_type=args.kind).tags}
    changed = bool(deleted) or any(
        row["state"] != "same" for row in describe(files, remote_hashes(api, args.kind, args.repo_id))
    )
    if args.tag in tags and (changed or tags[args.tag] != before):
        raise ValueError(f"--tag {args.tag} of {args.repo_id} stands for another content; name a new one.")
    operations: list[Any] = [
        *(CommitOperationAdd(file.name, file.path if file.replaced is None else file.replaced) for file in files),
        *(CommitOperationDelete(name) for name in deleted),
    ]
    message = args.message or f"Release {args.tag}"
    try:
        commit = api.create_commit(args.repo_id, operations, commit_message=message, repo_type=args.kind)
    except RuntimeError as error:  # what a broken upload of a large file is raised as
        raise ConnectionError(
            f"{error} Nothing was committed; the same command goes on, and does not send again what has arrived."
        ) from error
    if args.tag not in tags:
        api.create_tag(args.repo_id, tag=args.tag, repo_type=args.kind, revision=commit.oid)
    prefix = "" if args.kind == "model" else f"{args.kind}s/"
    address = f"{api.endpoint}/{prefix}{args.repo_id}"
    return {"commit": commit.oid, "new_commit": commit.oid != before, "url": f"{address}/tree/{args.tag}"}


def _space_sdk(files: Sequence[ReleaseFile]) -> str:
    from huggingface_hub import RepoCard

    card = next(file for file in files if file.name == CARD)
    return str(RepoCard(card.content().decode()).data.to_dict()["sdk"])


def _payload(
    args: argparse.Namespace, files: Sequence[ReleaseFile], problems: Sequence[Problem], loaded: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "kind": args.kind,
        "repo_id": args.repo_id,
        "tag": args.tag,
        "dry_run": args.dry_run,
        "total_bytes": sum(file.size for file in files),
        "problems": [problem.to_dict() for problem in problems],
        "loaded": loaded,
    }


def _refusal(problems: Sequence[Problem]) -> str:
    lines = [
        f"{'refused' if problem.refused else 'warning'}: {problem.file}: {problem.message}" for problem in problems
    ]
    return "\n".join([*lines, "Nothing was sent."])


def _summary(payload: dict[str, Any]) -> str:
    lines = [f"warning: {problem['file']}: {problem['message']}" for problem in payload["problems"]]
    lines += [f"{row['state']:8} {row['bytes']:>14,}  {row['file']}" for row in payload["files"]]
    lines += [f"{'deleted':8} {'':>14}  {name}" for name in payload["deleted"]]
    total = f"{len(payload['files'])} files, {payload['total_bytes']:,} bytes"
    if payload["dry_run"]:
        return "\n".join([*lines, f"{total}; nothing was sent (--dry-run)"])
    made = f"commit {payload['commit'][:12]}" if payload["new_commit"] else "nothing changed, no commit"
    return "\n".join([*lines, f"{total}; {made}, tag {payload['tag']}: {payload['url']}"])
