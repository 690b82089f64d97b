"""The machine: facts that are true here, and nothing that names a person, a host or a folder."""

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from dualstream.benchmarks import machine
from dualstream.benchmarks.shapes import build_model


def test_facts_are_those_of_this_machine():
    found = machine.describe_machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["memory_gib"] is None or found["memory_gib"] > 0.5
    assert found["cpu"] and found["cores"] >= 1
    if Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        assert set(found["instructions"]) == flags & set(machine.FAST_FLAGS)
    versions = machine.describe_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["python"] == platform.python_version()


def test_no_name_of_host_or_folder_is_told():
    told = json.dumps([machine.describe_machine(), machine.describe_versions()])
    assert platform.node() not in told or len(platform.node()) < 4
    assert str(Path.home()) not in told or str(Path.home()) == "/"
    assert str(machine.ROOT) not in told
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in told


def test_the_revision_says_whether_the_code_was_changed(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    assert machine.revision(tmp_path) is None
    git("init", "-q")
    assert machine.revision(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-qm", "first")
    name = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    assert machine.revision(tmp_path) == name
    (tmp_path / "result.json").write_text("{}")
    assert machine.revision(tmp_path) == name
    (tmp_path / "code.py").write_text("2\n")
    assert machine.revision(tmp_path) == f"{name} + changes"


@pytest.mark.parametrize(("layers", "reduced"), [(None, False), (2, True)])
def test_a_model_says_how_much_of_its_shape_it_is(layers, reduced):
    model = build_model("tiny-qwen2.5-vl", layers=layers)
    found = machine.describe_model(model, "tiny-qwen2.5-vl")
    assert found["layers"] == (layers or 4) and found["full_layers"] == 4
    assert found["vision_layers"] == found["full_vision_layers"] == 4
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["is_reduced"] is reduced and found["is_toy"]
    assert (found["dtype"], found["device"], found["image_size"]) == ("float32", "cpu", [448, 672])
    assert machine.describe_model(model, "tiny-qwen2.5-vl", (28, 56))["image_size"] == [28, 56]
