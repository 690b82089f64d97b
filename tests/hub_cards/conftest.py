"""A Hub on the loopback address for the tests of releases."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).with_name("loopback_hub.py"))
loopback_hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loopback_hub)


@pytest.fixture
def hub(monkeypatch):
    """A running Hub, which the real client of this process talks to."""
    with _serving(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def module_hub():
    """The same for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch, _serving(patch) as server:
        yield server


@contextmanager
def _serving(monkeypatch):
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session
    from transformers.utils import hub as transformers_hub

    server = loopback_hub.LoopbackHub().start()
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    address = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # the functions of the module go through it
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # the client of an earlier test's server
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def elsewhere():
    """Function (hub, kind, repo id, revision, ..., folder=) -> what a process without dualstream gets from the Hub."""
    return _elsewhere


def _elsewhere(hub, *arguments, folder):
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = Path(__file__).with_name("load_from_hub.py")
    child = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture
def stock_files():
    """Function (source, folder) -> folder with a stock checkpoint as others publish it: no decoder, no results."""
    return _stock_files


def _stock_files(source, folder):
    names = [p.name for p in Path(source).iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".md")]
    folder.mkdir()
    for name in names:
        if not name.startswith("visual_decoder") and name not in ("evaluation.json", "distillation.json"):
            shutil.copy(Path(source) / name, folder)
    return folder
