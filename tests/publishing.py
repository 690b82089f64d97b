"""Save checkpoints in every way there is, and let a process without this package load them.

Reached through the fixture ``publishing`` of ``conftest.py``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.utils.hub
from huggingface_hub import ModelCard
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
)

from dualstream.processing.processing_visual_decoder import PROCESSOR_CLASSES

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


def make_processor(family, processor_class=None):
    """A processor, ours unless told otherwise, for the tiny model of a family."""
    processor_class = processor_class or PROCESSOR_CLASSES[family]
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


def answer_elsewhere(script, request, root):
    """Let a script in a fresh process without the package load the checkpoints; return what it found by name."""
    (root / "request.json").write_text(json.dumps(request))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "HF_HOME": str(root / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.run(
        [sys.executable, str(script), str(root / "request.json")],
        env=environment, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return {Path(folder).name: value for folder, value in json.loads(child.stdout).items()}
