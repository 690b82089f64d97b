"""Whole runs: killed and continued, on two processes, and loaded again where this package is absent."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dualstream.train.sft import fine_tune, read_config

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("sft_process.py")
SMALL = {
    "max_train_rows": 24,
    "max_eval_rows": 4,
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "eval_strategy": "no",
    "save_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
}
LORA = {"train_vision": "lora", "train_connector": "full", "train_llm": "lora", "lora_r": 4, "lora_dropout": 0.1}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}


def options(folder, **changes):
    settings = {**SMALL, **changes, "output_dir": folder}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(folder, **changes):
    return fine_tune(read_config("tiny-qwen2-vl", options(folder, **changes)))


def start(*command, **environment):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**ENVIRONMENT, **environment}, check=False
    )


def weights(record):
    return load_file(Path(record["release"]) / "model.safetensors")


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("changes", "step", "resumed"),
    [({}, 3, "checkpoint-2"), (LORA, 4, "checkpoint-2")],
    ids=["full, killed between checkpoints", "lora, killed while it writes one"],
)
def test_a_killed_run_ends_with_the_very_same_weights(tmp_path, changes, step, resumed):
    straight = run(tmp_path / "straight", **changes)
    killed = start(sys.executable, SCRIPT, "kill", step, *options(tmp_path / "killed", **changes))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert left == {"checkpoint-2"} | ({"checkpoint-4"} if step == 4 else set())
    assert not (tmp_path / "killed" / "release").exists()
    continued = run(tmp_path / "killed", **changes)
    assert continued["resumed_from"] == resumed and straight["resumed_from"] is None
    assert continued["steps"] == straight["steps"] == 5
    assert largest_difference(weights(straight), weights(continued)) == 0
    losses = [[row["loss"] for row in record["log"] if "loss" in row] for record in (straight, continued)]
    assert losses[0] == losses[1]


def test_two_processes_give_the_weights_of_one(tmp_path):
    descent = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.03,
    }  # Adam would blow up rounding where gradients vanish
    one = run(tmp_path / "one", **descent)
    command = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "-m", "dualstream.cli", "train", "sft")
    settings = options(tmp_path / "two", per_device_train_batch_size=2, **descent)
    finished = start(
        sys.executable, *command, "--config", "tiny-qwen2-vl", *settings, "--json", ACCELERATE_USE_CPU="true"
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = json.loads(finished.stdout)  # one object, by one process
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert largest_difference(weights(one), weights(two)) < 3e-6
    losses = [[row["loss"] for row in record["log"] if "loss" in row] for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def loaded(folder, remote):
    finished = start(sys.executable, SCRIPT, "load", folder, "remote" if remote else "stock")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


def test_releases_load_in_a_fresh_process_without_this_package(tmp_path):
    short = {"max_steps": 1, "save_strategy": "no"}
    stock = run(tmp_path / "stock", **short, release_dtype="bfloat16")
    found = loaded(stock["release"], remote=False)
    assert (found["class"], found["lost"]) == ("Qwen2VLForConditionalGeneration", [])
    assert found["dtype"] == "torch.bfloat16" and found["kept"] is None
    ours = run(tmp_path / "ours", **short, **LORA, visual_decoder=True, compression="rle")
    found = loaded(ours["release"], remote=True)
    assert (found["class"], found["lost"]) == ("Qwen2VLWithVisualDecoder", [])
    assert found["kept"][0] < found["kept"][1]  # it compresses, as it was trained to
    assert torch.isfinite(torch.tensor(found["logits"])).all()
    assert found["dtype"] == "torch.float32"
    scaled = run(tmp_path / "scaled", **short, rope_scaling="table:9:4", train_vision="frozen")
    found = loaded(scaled["release"], remote=True)
    assert (found["class"], found["lost"]) == ("Qwen2VLRopeScaled", [])
