"""A Hub on the loopback address for the tests of releases."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).with_name("loopback_hub.py"))
loopback_hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loopback_hub)


@pytest.fixture
def hub(monkeypatch):
    """A running Hub, which the real client of this process talks to."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = loopback_hub.LoopbackHub().start()
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
