"""What every result file carries so that it can be made again: command, versions, seed, model and time taken."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("dualstream", "torch", "transformers", "datasets", "numpy")


def make_manifest(seed: int, started: float, **facts: Any) -> dict[str, Any]:
    """Describe the run that is ending.

    Args:
        seed: the run's seed.
        started: ``time.time()`` at its start.
        **facts: what else identifies the run (model, revision, options).

    Returns:
        A JSON-serialisable object. The command names the program, not the folder it is installed in.
    """
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {package: version(package) for package in PACKAGES},
        "python": sys.version.split()[0],
        "seed": seed,
        "seconds": round(time.time() - started, 1),
        **facts,
    }


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write a JSON file so that a killed run leaves either the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(payload, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
