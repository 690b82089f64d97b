"""A folder that holds one training run: whose it is, and which of its checkpoints were written to their end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.eval.manifest import write_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

SETTINGS = "configuration.json"
MARK = "complete.json"
# Training arguments that may differ between two starts of one run: none of them changes the weights that come out.
NOT_PART_OF_A_RUN = (
    "output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "logging_nan_inf_filter",
    "report_to",
    "run_name",
    "project",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_multiprocessing_context",
    "local_rank",
    "ddp_backend",
    "ddp_timeout",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
)


def open_run(config: TrainingArguments, settings: dict[str, Any], result: str) -> tuple[Path, dict[str, Any] | None]:
    """Claim the folder of a run, in all its processes.

    Args:
        config: tells the folder and the processes.
        settings: what identifies the run.
        result: file of the record that a finished run leaves.

    Returns:
        The folder, and the record if the run is finished.

    Raises:
        ValueError: the folder holds another run, or processes do not know of each other.
    """
    require_one_group(config.world_size)
    folder = Path(str(config.output_dir))
    with config.main_process_first(desc="run folder"):
        claim_folder(folder, settings)
    finished = folder / result
    return folder, json.loads(finished.read_text(encoding="utf-8")) if finished.is_file() else None


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a run folder, or check that the run in it is this one.

    Args:
        folder: the folder.
        settings: what identifies the run, JSON-serialisable.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    settings, path = json.loads(json.dumps(settings)), folder / SETTINGS
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
        if changed:
            shown = ", ".join(
                f"{name}: {stored.get(name)!r} there, {settings.get(name)!r} now" for name in changed[:5]
            )
            raise ValueError(
                f"output_dir={folder} holds a run of another configuration ({shown}); choose another folder, or "
                "remove that one."
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir={folder} is not empty and holds no run of this command; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Say that a checkpoint was written to its end, by all processes."""
    write_json(checkpoint / MARK, facts)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Find the newest ``checkpoint-N`` that was marked, and remove those that a killed process left without a mark.

    Returns:
        None if there is none.
    """
    numbered = {
        int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()
    }
    complete = []
    for _, path in sorted(numbered.items()):
        if (path / MARK).is_file():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return complete[-1] if complete else None


def agreed_checkpoint(folder: Path, main_process: bool) -> Path | None:
    """Return what ``last_complete_checkpoint`` finds in the main process, in every process."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [last_complete_checkpoint(folder) if main_process else None]
    broadcast_object_list(found)
    return found[0]


def require_one_group(world_size: int) -> None:
    """Stop processes that were started together but do not know of each other: each would train by itself.

    Args:
        world_size: processes that the trainer sees.

    Raises:
        ValueError: another number was started.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != announced:
        raise ValueError(
            f"{announced} processes were started but each believes to be one of {world_size}; on a CPU set "
            "ACCELERATE_USE_CPU=true for torchrun, or use_cpu: true."
        )
