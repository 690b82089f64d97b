"""Shared fixtures: tiny random models of every family, and slow independent references."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def _sibling(name: str):
    """Import a helper file of this folder; under ``--import-mode=importlib`` a plain import cannot find it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for _shared in (
    "headless_chromium",
    "peer_prompts",
    "reading_pages",
    "rotary_towers",
):  # tests import these by their names
    _sibling(_shared)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A ``headless_chromium.Chromium`` with one page."""
    browsers = sys.modules["headless_chromium"]
    if browsers.find_chromium() is None:
        pytest.skip("no Chromium on this machine")
    browser = browsers.Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def tiny_models():
    """The module ``tiny_models.py``: constants and builders."""
    return _sibling("tiny_models")


@pytest.fixture(scope="session")
def reference():
    """The module ``compression_reference.py``: brute-force plan and per-sample, cache-free generation."""
    return _sibling("compression_reference")


@pytest.fixture(scope="session")
def publishing():
    """The module ``publishing.py``: tiny processors, ways to save a checkpoint, a process without this package."""
    return _sibling("publishing")


@pytest.fixture(scope="session")
def tiny_model(tiny_models):
    """Function family -> ``Tiny``; the model is shared by the session, so tests leave it as they found it."""
    built = {}

    def get(family: str):
        if family not in built:
            built[family] = tiny_models.Tiny(family, tiny_models.build_tiny_model(family))
        return built[family]

    return get


@pytest.fixture
def new_tiny_model(tiny_models):
    """Function (family, seed=0) -> ``Tiny`` with a model of its own."""
    return lambda family, seed=0: tiny_models.Tiny(family, tiny_models.build_tiny_model(family, seed))


@pytest.fixture(scope="session")
def coarse_decoder(tiny_models):
    """A visual decoder with few distinct readings, so that runs occur, and with token tables.

    Readings 0, 3, 6, ... count as punctuation; all else has a text of its own.
    """
    from dualstream.modeling.visual_decoder import VisualDecoder

    decoder = VisualDecoder.from_unembedding(tiny_models.coarse_decoder_weight())
    decoder.meaningless = torch.arange(tiny_models.VOCAB) % 3 == 0
    decoder.text_class = torch.arange(tiny_models.VOCAB)
    return decoder
