"""A distillation that is killed and continued, or shared by two processes, ends with the weights of a plain one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from dualstream.modeling import VisualDecoder, load_model
from dualstream.train.distill import distill, read_config

pytestmark = pytest.mark.slow
SETTINGS = {
    "model": "tiny-llava",
    "train_images": "scenes:train:11:48",
    "eval_images": "scenes:validation:3:48",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 2.0e-3,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def write_config(tmp_path):
    """Function (name, options) -> path of a YAML file with the settings above and these."""

    def write(name, **options):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(tmp_path / name), **options}))
        return str(path)

    return write


def weights(folder):
    return VisualDecoder.from_pretrained(folder).own_parameter.detach()


def test_a_killed_run_ends_with_the_same_weights(write_config, tmp_path):
    """SIGKILL in the middle of the second epoch, then the same command again."""
    straight = distill(read_config(write_config("straight"), []))
    config, folder = write_config("killed"), tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dualstream.cli", "train", "distill", "--config", config],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-4" / "complete.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "distillation.json").exists()

    continued = distill(read_config(config, []))
    name = "visual_decoder.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    last = [torch.load(tmp_path / run / "checkpoint-9" / "optimizer.pt")["state"][0] for run in ("straight", "killed")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    curves = [
        [(row["step"], row["loss"], row.get("ce")) for row in record["curves"] if "loss" in row]
        for record in (straight, continued)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 9
    assert continued["figures"] == straight["figures"]


def test_two_processes_equal_one(write_config, tmp_path):
    """Eleven pictures: the last update of an epoch has one process with a picture less than the other."""
    options = {"num_train_epochs": 2}
    one = distill(read_config(write_config("one", per_device_train_batch_size=8, **options), []))
    config = write_config("two", per_device_train_batch_size=4, **options)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dualstream.cli"]
    result = subprocess.run(
        [sys.executable, "-m", *command, "train", "distill", "--config", config, "--json"],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads(result.stdout)  # one object, though two processes ran
    assert two["manifest"]["processes"] == 2 and one["manifest"]["processes"] == 1
    assert [row["step"] for row in two["curves"]] == [row["step"] for row in one["curves"]]
    for name in ("loss", "kl", "ce", "agreement", "eval_loss", "eval_agreement", "eval_boundary_f1"):
        values = [[row[name] for row in record["curves"] if name in row] for record in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-6), name
    start = load_model("tiny-llava", device="cpu")[0].get_output_embeddings().weight
    assert (weights(tmp_path / "one") - start).abs().max() > 1e-3
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-6)
