"""Run as a script by test_remote_code: load checkpoints where this package cannot be imported, print what they answer.

Usage: python load_without_package.py REQUEST.json  (folders, image, question, methods)
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
TRUST = {"trust_remote_code": True}


def messages(image, question):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def answers(model, processor, request):
    image = Image.open(request["image"])
    chat = messages(image, request["question"])
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = {}
    choices = {"by processor": inputs["compression"], **{str(method): method for method in request["methods"]}}
    for name, choice in choices.items():
        ids = model.generate(**{**inputs, "compression": choice}, max_new_tokens=6, do_sample=False)
        report = model.last_compression
        found[name] = [ids[0].tolist(), None if report is None else report.kept_tokens]
    with torch.no_grad():
        found["logits"] = model(**{**inputs, "compression": "none"}).logits[0, -1].tolist()
    return found


def piped(pipe, request):
    chat = messages(Image.open(request["image"]), request["question"])
    return pipe(text=chat, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})


def load(auto_class, folder, processor, request):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **TRUST)
    return model, {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "lost": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "answers": answers(model, processor, request),
    }


def examine(folder, request):
    config = AutoConfig.from_pretrained(folder, **TRUST)
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    model, first = load(AutoModelForImageTextToText, folder, processor, request)
    _, second = load(AutoModel, folder, processor, request)
    pipe = pipeline("image-text-to-text", model=folder, **TRUST)
    model.save_pretrained(f"{folder}-again")
    processor.save_pretrained(f"{folder}-again")
    again_processor = AutoProcessor.from_pretrained(f"{folder}-again", **TRUST)
    _, third = load(AutoModel, f"{folder}-again", again_processor, request)
    return {
        "config": [
            type(config).__name__,
            config.model_type,
            config.visual_compression,
            model.visual_decoder.kind,
        ],
        "processor": [type(processor).__name__, processor.compression],
        "AutoModelForImageTextToText": first,
        "AutoModel": second,
        "saved again": third,
        "pipeline": piped(pipe, request)[0]["generated_text"],
    }


if __name__ == "__main__":
    sys.modules["dualstream"] = None  # any import of it now fails, also where it is installed
    with open(sys.argv[1], encoding="utf-8") as file:
        given = json.load(file)
    print(json.dumps({folder: examine(folder, given) for folder in given["folders"]}))
