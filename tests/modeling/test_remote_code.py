"""A checkpoint of ours, saved by any path, loads in a fresh process without this package and answers the same."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dualstream.modeling import VisualDecoder, infer_class
from dualstream.processing.processing_visual_decoder import PROCESSOR_CLASSES

CHILD = Path(__file__).with_name("load_without_package.py")
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
KINDS = {"qwen2_vl": "factored", "qwen2_5_vl": "pruned", "internvl": "factored"}  # the others are linear
WAYS = {"llava": ("saved", "trained", "pushed"), "qwen2_vl": ("saved", "trained", "pushed")}
CASES = [(family, way) for family in FAMILIES for way in WAYS.get(family, ("saved",))]
METHODS = [None, "none", "rle", "rle_drop_top1"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} SLOT {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def make_tokenizer(tokens):
    """A tokenizer of 200 words whose last ones are the image tokens of the tiny models."""
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **dict(enumerate(tokens.values(), start=190))}
    words = {names.get(i, f"word{i}" if i % 5 else "!" * (i // 5 + 1)): i for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=tokens,
    )


def make_processor(family):
    """Our processor of a family, for the tiny model of that family."""
    processor_class = PROCESSOR_CLASSES[family]
    if family == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        template = TEMPLATE.replace("SLOT", "<image>")
        tokenizer = make_tokenizer({"image_token": "<image>"})
        return processor_class(images, tokenizer, chat_template=template, **settings)
    if family == "internvl":
        images = GotOcr2ImageProcessor(size={"height": 64, "width": 64}, crop_to_patches=True, max_patches=2)
        names = ("context_image_token", "video_token", "start_image_token", "end_image_token")
        tokens = dict(zip(names, ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"), strict=True))
        template = TEMPLATE.replace("SLOT", "<IMG_CONTEXT>")
        video = InternVLVideoProcessor()
        return processor_class(images, make_tokenizer(tokens), video, image_seq_length=16, chat_template=template)
    images = Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    tokens = {name: f"<|{name}|>" for name in names}
    template = TEMPLATE.replace("SLOT", "<|vision_start_token|> <|image_token|> <|vision_end_token|>")
    video = (Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor)(patch_size=8)
    return processor_class(images, make_tokenizer(tokens), video, chat_template=template)


def our_model(family, tiny_model, folder):
    """One of our models made from a stock checkpoint, with a decoder of its own that makes runs."""
    stock = tiny_model(family).model
    stock.save_pretrained(folder)
    make_processor(family).tokenizer.save_pretrained(folder)
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


class LocalHub:
    """Stands in for the Hub: a commit copies the uploaded files into a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        self.folder.mkdir(exist_ok=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)


def push(model, processor, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.utils.hub, "hf_api", lambda: LocalHub(folder))
        patch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("# card"))
        model.push_to_hub("someone/model")
        processor.push_to_hub("someone/model")


def train_and_save(model, processor, inputs, folder):
    """One step of the stock Trainer, then its own way of saving."""
    labels = inputs["input_ids"].clone()
    rows = [{**inputs, "labels": labels}]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3,
        report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=lambda batch: batch[0], processing_class=processor
    )
    trainer.train()
    trainer.save_model(str(folder))
    shutil.rmtree(folder / "run", ignore_errors=True)


def child_module():
    """The functions of the child's script, to ask the same questions here."""
    spec = importlib.util.spec_from_file_location("load_without_package", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def publish_and_answer(tiny_model, root):
    """Save models in every way; return their answers by checkpoint name and the request that the child will get."""
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "picture.png")
    request = {"image": str(root / "picture.png"), "question": "word6 word7", "methods": METHODS, "folders": []}
    here = child_module()
    expected = {}
    for family, way in CASES:
        folder = root / f"{family}-{way}"
        model, processor = our_model(family, tiny_model, root / f"{family}-stock"), make_processor(family)
        processor.compression = "rle_drop_top1"
        if way == "saved":
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        elif way == "pushed":
            push(model, processor, folder)
        else:
            chat = here.messages(Image.fromarray(picture), request["question"])
            inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            train_and_save(model, processor, inputs, folder)
        request["folders"].append(str(folder))
        pipe = pipeline("image-text-to-text", model=model.eval(), processor=processor)
        expected[folder.name] = {
            "answers": here.answers(model, processor, request),
            "pipeline": here.piped(pipe, request)[0]["generated_text"],
            "class": type(model).__name__,
        }
    return expected, request


def answer_elsewhere(request, root):
    """Let a fresh process without the package load the checkpoints; return what it found by checkpoint name."""
    (root / "request.json").write_text(json.dumps(request))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "HF_HOME": str(root / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.run(
        [sys.executable, str(CHILD), str(root / "request.json")],
        env=environment, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return {Path(folder).name: value for folder, value in json.loads(child.stdout).items()}


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
def test_answers_are_the_same_without_the_package(tiny_model, tmp_path):
    """One test, since the fresh process costs more than all its checks."""
    expected, request = publish_and_answer(tiny_model, tmp_path)
    found = answer_elsewhere(request, tmp_path)
    for family, way in CASES:
        name = f"{family}-{way}"
        check_same(expected[name], found[name], family)
        check_choices_differ(expected[name]["answers"])
        if way == "trained":
            assert expected[name]["answers"]["logits"] != expected[f"{family}-saved"]["answers"]["logits"]
