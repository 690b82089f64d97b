"""What a start costs: ``import dualstream`` and every command's ``--help``, each in a process of its own.

A process that imports nothing (``python -c pass``) runs in turns with them, and so do the imports that no program with
a model comes round. Besides the time, the modules that were imported are counted: they are the same on every machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dualstream.cli import COMMANDS, GROUPS
from dualstream.measuring import MILLISECONDS, against, interleaved, timing

SUITE = "startup"
BARE = "python -c pass"
#: Libraries that make a user wait; no ``--help`` may import one of them.
HEAVY = ("torch", "transformers", "datasets", "scipy", "pandas", "pyarrow", "matplotlib", "accelerate", "peft", "trl")
IMPORTS = ("import dualstream", "import dualstream.modeling", "import numpy")
#: What every program with a model waits for, and ours beside it: seconds each, so they run in fewer rounds.
LIBRARIES = (
    "import torch",
    "import transformers",
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "from dualstream.modeling import load_model",
)
LIBRARY_ROUNDS = 5
_PROBE = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {code}
print(json.dumps(sorted(sys.modules)))
"""


def programs() -> dict[str, str]:
    """Everything whose start is measured: name -> Python code of one line."""
    words = [["--help"], ["--version"], *([group, "--help"] for group in GROUPS)]
    words += [[*name.split(), "--help"] for name in COMMANDS]
    commands = {f"dualstream {' '.join(argv)}": f"from dualstream.cli import main; main({argv!r})" for argv in words}
    return {BARE: "pass", **{code: code for code in (*IMPORTS, *LIBRARIES)}, **commands}


def run(
    rounds: int, progress: Callable[[], Any] | None = None, chosen: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Time the starts in turns.

    Args:
        rounds: measured rounds, after one that brings the files into the cache of the system; of `LIBRARIES` at most
            `LIBRARY_ROUNDS`.
        progress: called after every process.
        chosen: see ``programs``; default all of them. `BARE` is always among them.

    Returns:
        One row per program, the slowest first: times, the ratio to `BARE`, ``added_ms`` (median over the rounds of
        the difference), ``modules`` (imported beyond those of `BARE`) and ``heavy`` (those of `HEAVY` among them).

    Raises:
        ValueError: there are fewer than two rounds.
    """
    wanted = programs() if chosen is None else chosen
    slow = {name: code for name, code in wanted.items() if name in LIBRARIES}
    quick = {BARE: "pass", **{name: code for name, code in wanted.items() if name not in slow}}
    rows = _rows(quick, rounds, progress)
    if slow:
        rows += _rows({BARE: "pass", **slow}, min(rounds, LIBRARY_ROUNDS), progress)[1:]
    return sorted(rows, key=lambda row: -row["median_ms"])


def _rows(wanted: Mapping[str, str], rounds: int, progress: Callable[[], Any] | None) -> list[dict[str, Any]]:
    ways = {name: partial(_start, code) for name, code in wanted.items()}
    seconds = interleaved(ways, rounds, progress=progress)
    bare = modules_after("pass")
    return [
        {
            "suite": SUITE,
            "way": name,
            "batch": None,
            "images": None,
            **timing(seconds[name]),
            **against(seconds[name], seconds[BARE], BARE),
            "added_ms": float(np.median(seconds[name] - seconds[BARE])) * MILLISECONDS,
            **_imported(modules_after(code) - bare),
        }
        for name, code in wanted.items()
    ]


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh process has imported once it ran some code of one line."""
    return set(json.loads(_start(_PROBE.format(code=code))))


def _imported(modules: set[str]) -> dict[str, Any]:
    return {"modules": len(modules), "heavy": [name for name in HEAVY if name in modules]}


def _start(code: str) -> str:
    """Run code in a fresh process, outside the repository, whose folders would be importable by their bare names.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.executable).anchor)
    if done.returncode:
        raise RuntimeError(f"{code!r} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
