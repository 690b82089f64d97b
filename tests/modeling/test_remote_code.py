"""A checkpoint of ours, saved by any path, loads in a fresh process without this package and answers the same."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from dualstream.modeling import VisualDecoder, infer_class

CHILD = Path(__file__).with_name("load_without_package.py")
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
KINDS = {"qwen2_vl": "factored", "qwen2_5_vl": "pruned", "internvl": "factored"}  # the others are linear
WAYS = {"llava": ("saved", "trained", "pushed"), "qwen2_vl": ("saved", "trained", "pushed")}
CASES = [(family, way) for family in FAMILIES for way in WAYS.get(family, ("saved",))]
METHODS = [None, "none", "rle", "rle_drop_top1"]


def our_model(family, tiny_model, processor, folder):
    """One of our models made from a stock checkpoint, with a decoder of its own that makes runs."""
    stock = tiny_model(family).model
    stock.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    model = infer_class(stock).from_pretrained(folder)
    model.set_visual_decoder(decoder_with_runs(KINDS.get(family, "linear"), model.lm_head.weight.detach()))
    model.config.visual_compression = "rle"
    return model


def decoder_with_runs(kind, unembedding):
    """A decoder of few readings, one of which (token 5, a row of exclamation marks) is punctuation."""
    generator = torch.Generator().manual_seed(0)
    decoder = VisualDecoder(*unembedding.shape, kind, 3 if kind == "pruned" else None)
    few = torch.randn(3, unembedding.shape[1], generator=generator)
    if kind == "linear":
        weight = few[torch.arange(200) % 3] * (1 - 0.004 * torch.arange(200))[:, None]
    elif kind == "pruned":
        weight = few
        decoder.set_classes((torch.arange(200) + 1) % 3, torch.tensor([5, 6, 7]))
    else:  # one direction of the features decides between tokens 5 and 6
        contrast = torch.zeros(200)
        contrast[5], contrast[6] = 1, -1
        weight = torch.outer(torch.linalg.pinv(unembedding) @ contrast, few[0])
    with torch.no_grad():
        decoder.own_parameter.copy_(weight)
    return decoder


def child_module():
    """The functions of the child's script, to ask the same questions here."""
    spec = importlib.util.spec_from_file_location("load_without_package", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def publish_and_answer(tiny_model, publishing, root):
    """Save models in every way; return their answers by checkpoint name and the request that the child will get."""
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "picture.png")
    request = {"image": str(root / "picture.png"), "question": "word6 word7", "methods": METHODS, "folders": []}
    here = child_module()
    expected = {}
    for family, way in CASES:
        folder = root / f"{family}-{way}"
        processor = publishing.make_processor(family)
        model = our_model(family, tiny_model, processor, root / f"{family}-stock")
        processor.compression = "rle_drop_top1"
        if way == "saved":
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        elif way == "pushed":
            publishing.push(model, processor, folder)
        else:
            chat = here.messages(Image.fromarray(picture), request["question"])
            inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            publishing.train_and_save(model, processor, inputs, folder)
        request["folders"].append(str(folder))
        pipe = pipeline("image-text-to-text", model=model.eval(), processor=processor)
        expected[folder.name] = {
            "answers": here.answers(model, processor, request),
            "pipeline": here.piped(pipe, request)[0]["generated_text"],
            "class": type(model).__name__,
        }
    return expected, request


def check_same(expected, found, family):
    for source in ("AutoModelForImageTextToText", "AutoModel", "saved again"):
        assert found[source]["class"] == expected["class"]
        assert found[source]["module"] == "transformers_modules"
        assert found[source]["lost"] == []
        assert found[source]["answers"] == expected["answers"]
    assert found["pipeline"] == expected["pipeline"]
    assert found["config"][:2] == [expected["class"] + "Config", f"{family}_visual_decoder"]
    assert found["config"][2]["method"] == "rle" and found["config"][3] == KINDS.get(family, "linear")
    assert found["processor"] == [expected["class"] + "Processor", "rle_drop_top1"]


def check_choices_differ(answers):
    """The processor's choice, the model's and the call's keep different numbers of tokens."""
    assert answers["by processor"] == answers["rle_drop_top1"]
    assert answers["None"] == answers["rle"]
    assert answers["none"][1] is None and answers["rle"][1] > answers["rle_drop_top1"][1]


@pytest.mark.slow
def test_answers_are_the_same_without_the_package(tiny_model, publishing, tmp_path):
    """One test, since the fresh process costs more than all its checks."""
    expected, request = publish_and_answer(tiny_model, publishing, tmp_path)
    found = publishing.answer_elsewhere(CHILD, request, tmp_path)
    for family, way in CASES:
        name = f"{family}-{way}"
        check_same(expected[name], found[name], family)
        check_choices_differ(expected[name]["answers"])
        if way == "trained":
            assert expected[name]["answers"]["logits"] != expected[f"{family}-saved"]["answers"]["logits"]
