"""What the training commands share: presets beside the code, and settings from a YAML file and the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def presets_of(command: str) -> dict[str, Path]:
    """Return name -> file of the presets of a command: ``COMMAND_NAME.yaml`` beside this file."""
    files = Path(__file__).parent.glob(f"{command}_*.yaml")
    return {path.stem.removeprefix(f"{command}_").replace("_", "-"): path for path in files}


def add_config_argument(parser: argparse.ArgumentParser, presets: dict[str, Path]) -> None:
    """Add ``--config``."""
    names = ", ".join(sorted(presets))
    parser.add_argument(
        "--config", required=True, metavar="FILE", help=f"YAML file with the settings, or a preset: {names}"
    )


def read_settings(kind: type, source: str, options: list[str], presets: dict[str, Path], command: str) -> Any:
    """Read the settings of a run.

    Args:
        kind: the dataclass of the settings.
        source: a YAML file or the name of a preset.
        options: ``--field value`` pairs that take precedence.
        presets: name -> file.
        command: its name, for messages.

    Returns:
        A `kind`.

    Raises:
        ValueError: there is no such file, or a field or value is not accepted.
    """
    from trl import TrlParser

    path = presets.get(source, Path(source))
    if not path.is_file():
        raise ValueError(f"config={source!r} is neither a file nor a preset ({', '.join(sorted(presets))}).")
    kinds: list[Any] = [kind]
    (config,) = TrlParser(kinds, prog=f"dualstream train {command}").parse_args_and_config(
        ["--config", str(path), *options]
    )
    return config
