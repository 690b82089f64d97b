"""A checkpoint of ours, saved by any path, loads in a fresh process without this package and answers the same."""

import copy
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
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dualstream.modeling import infer_class

CHILD = Path(__file__).with_name("load_without_package.py")
FAMILIES = ("llava", "qwen2_vl")
METHODS = [None, "none", "rle", "rle_drop_top1"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} SLOT {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def make_tokenizer(names):
    words = {names.get(i, f"word{i}" if i % 5 else "!" * (i // 5 + 1)): i for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [name for i, name in names.items() if i >= 190]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=special,
    )


def make_processor(family):
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            make_tokenizer({**names, 190: "<image>"}),
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE.replace("SLOT", "<image>"),
        )
    vision = {190: "<|image_pad|>", 191: "<|video_pad|>", 192: "<|vision_start|>", 193: "<|vision_end|>"}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096),
        make_tokenizer({**names, **vision}),
        Qwen2VLVideoProcessor(patch_size=8),
        chat_template=TEMPLATE.replace("SLOT", "<|vision_start|> <|image_pad|> <|vision_end|>"),
    )


def our_model(family, tiny_model, folder):
    """One of our models made from a stock checkpoint, with a decoder of its own that makes runs."""
    stock = tiny_model(family).model
    stock.save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    model = infer_class(stock).from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, model.visual_decoder.hidden_size, generator=generator)
    with torch.no_grad():
        model.visual_decoder.weight.copy_(few[torch.arange(200) % 3] * (1 - 0.004 * torch.arange(200))[:, None])
    model.config.visual_compression = "rle"
    return model


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
    """The child's functions, without what it does to ``sys.modules``."""
    spec = importlib.util.spec_from_file_location("load_without_package", CHILD)
    module = importlib.util.module_from_spec(spec)
    package = sys.modules.get("dualstream")
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["dualstream"] = package
    return module


@pytest.fixture(scope="module")
def outcome(tiny_model, tmp_path_factory):
    """Checkpoints of two families saved in three ways; what they answer here and what they answer elsewhere."""
    root = tmp_path_factory.mktemp("published")
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "picture.png")
    request = {"image": str(root / "picture.png"), "question": "word6 word7", "methods": METHODS, "folders": []}
    here = child_module()
    expected = {}
    for family in FAMILIES:
        model = our_model(family, tiny_model, root / f"{family}-stock")
        processor = make_processor(family)
        saved, trained, pushed = (root / f"{family}-{way}" for way in ("saved", "trained", "pushed"))
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        push(model, processor, pushed)
        chat = here.messages(Image.fromarray(picture), request["question"])
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        after_step = copy.deepcopy(model)
        train_and_save(after_step, processor, inputs, trained)
        for folder, source in ((saved, model), (pushed, model), (trained, after_step.eval())):
            request["folders"].append(str(folder))
            pipe = pipeline("image-text-to-text", model=source, processor=processor)
            expected[folder.name] = {
                "answers": here.answers(source, processor, request),
                "pipeline": here.piped(pipe, request)[0]["generated_text"],
                "class": type(source).__name__,
            }
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
    found = {Path(folder).name: value for folder, value in json.loads(child.stdout).items()}
    return expected, found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["saved", "trained", "pushed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_without_the_package(outcome, family, way):
    expected, found = (side[f"{family}-{way}"] for side in outcome)
    for source in ("AutoModelForImageTextToText", "AutoModel", "saved again"):
        assert found[source]["class"] == expected["class"]
        assert found[source]["module"] == "transformers_modules"
        assert found[source]["lost"] == []
        assert found[source]["answers"] == expected["answers"]
    assert found["pipeline"] == expected["pipeline"]
    assert found["config"][:2] == [expected["class"] + "Config", f"{family}_visual_decoder"]
    assert found["config"][2]["method"] == "rle"


def test_the_comparison_is_not_vacuous(outcome):
    """Methods keep different numbers of tokens, and a training step changed the answers' logits."""
    expected, _ = outcome
    for family in FAMILIES:
        saved = expected[f"{family}-saved"]["answers"]
        assert saved["None"] == saved["rle"]
        assert saved["none"][1] is None and saved["rle"][1] != saved["rle_drop_top1"][1]
        assert saved["logits"] != expected[f"{family}-trained"]["answers"]["logits"]
