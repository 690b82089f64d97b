"""A checkpoint with scaled RoPE, saved by any path, loads and answers the same where this package is not installed."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from dualstream.modeling.auto import MODEL_CLASSES, ROPE_SCALED_CLASSES
from dualstream.modeling.rope_towers import vision_rotaries

CHILD = Path(__file__).with_name("load_rope_scaled.py")
STOCK_PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


@dataclass
class Case:
    """A checkpoint: its family, its scaling, how it is saved, and whether it has a visual decoder too."""

    family: str
    scaling: str
    way: str = "saved"
    decoder: bool = False


CASES = {
    "fixed": Case("qwen2_vl", "poly:99:1"),
    "trained": Case("qwen2_vl", "table:9:1", "trained"),
    "pushed": Case("qwen2_vl", "table:9:1", "pushed"),
    "one axis": Case("qwen2_5_vl", "poly:99:1:w"),
    "newest": Case("qwen3_vl", "sigmoid:99:0.2"),
    "both": Case("qwen2_vl", "poly:99:1", decoder=True),
}


def child_module():
    """The functions of the child's script, to ask the same questions here."""
    spec = importlib.util.spec_from_file_location("load_rope_scaled", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(case, tiny_model, coarse_decoder, folder):
    """One of our models from a stock checkpoint; a learned table has moved."""
    tiny_model(case.family).model.save_pretrained(folder)
    classes = MODEL_CLASSES if case.decoder else ROPE_SCALED_CLASSES
    model = classes[case.family].from_pretrained(folder, vision_rope_scaling=case.scaling)
    if case.decoder:
        model.set_visual_decoder(coarse_decoder)
        model.config.visual_compression = "rle"
    for module in vision_rotaries(model).values():
        if hasattr(module, "log_scale"):
            with torch.no_grad():
                module.log_scale += torch.linspace(-0.5, 0.5, module.log_scale.numel()).view_as(module.log_scale)
    return model


def save(case, model, processor, publishing, request, folder):
    """Save by the way of the case; training comes before it."""
    if case.way == "saved":
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    elif case.way == "pushed":
        publishing.push(model, processor, folder)
    else:
        chat = child_module().messages(request)
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        publishing.train_and_save(model, processor, inputs, folder)


@pytest.mark.slow
def test_scaled_checkpoints_answer_the_same_without_the_package(tiny_model, publishing, coarse_decoder, tmp_path):
    """One test, since the fresh process costs more than all its checks."""
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    request = {"image": str(tmp_path / "picture.png"), "question": "word6 word7", "folders": []}
    here, expected = child_module(), {}
    for name, case in CASES.items():
        processor = publishing.make_processor(case.family, None if case.decoder else STOCK_PROCESSORS[case.family])
        model = make_model(case, tiny_model, coarse_decoder, tmp_path / f"{name}-stock")
        save(case, model, processor, publishing, request, tmp_path / name)
        request["folders"].append(str(tmp_path / name))
        expected[name] = here.answers(model.eval(), processor, request)
    found = publishing.answer_elsewhere(CHILD, request, tmp_path)
    for name, case in CASES.items():
        for source in ("AutoModelForImageTextToText", "AutoModel", "saved again"):
            assert found[name][source] == expected[name], (name, source)
        suffix = "_visual_decoder" if case.decoder else "_rope_scaled"
        assert found[name]["model type"] == case.family + suffix
        scaling, frequencies = found[name]["changed"]
        assert scaling == {"type": "exp", "axes": "both", "gamma": 3.0}
        assert frequencies == pytest.approx([1, 0.01 * 3**0.5])  # the tiny towers have the ratios 0 and 1/2
    assert expected["trained"]["log_scale"] != expected["pushed"]["log_scale"]  # training has moved the table
    assert expected["fixed"]["logits"] != expected["both"]["logits"]  # the latter is compressed
