"""Run as a script by test_rope_scaled_remote_code: load scaled checkpoints where this package cannot be imported.

Usage: python load_rope_scaled.py REQUEST.json  (folders, image, question); prints what each of them answers.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
TRUST = {"trust_remote_code": True}


def messages(request):
    image = Image.open(request["image"])
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": request["question"]}]}
    ]


def answers(model, processor, request):
    """The class, its frequencies and scaling, and what it answers by itself and through a pipeline."""
    inputs = processor.apply_chat_template(
        messages(request), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 6, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    rotary = model.model.visual.rotary_pos_emb
    scale = getattr(rotary, "log_scale", None)
    with torch.no_grad():
        return {
            "class": type(model).__name__,
            "processor": type(processor).__name__,
            "scaling": model.config.vision_rope_scaling,
            "frequencies": rotary.inv_freq.tolist(),
            "log_scale": None if scale is None else scale.tolist(),
            "ids": model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist(),
            "logits": model(**inputs).logits[0, -1].tolist(),
            "pipeline": pipe(text=messages(request), **options)[0]["generated_text"],
        }


def load(auto_class, folder, request):
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **TRUST)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__module__.startswith("transformers_modules.")
    return model, processor, answers(model, processor, request)


def examine(folder, request):
    model, processor, first = load(AutoModelForImageTextToText, folder, request)
    model.save_pretrained(f"{folder}-again")
    processor.save_pretrained(f"{folder}-again")
    changed = AutoModel.from_pretrained(folder, vision_rope_scaling="exp:3", **TRUST)
    return {
        "AutoModelForImageTextToText": first,
        "AutoModel": load(AutoModel, folder, request)[2],
        "saved again": load(AutoModel, f"{folder}-again", request)[2],
        "model type": AutoConfig.from_pretrained(folder, **TRUST).model_type,
        "changed": [changed.config.vision_rope_scaling, changed.model.visual.rotary_pos_emb.inv_freq.tolist()],
    }


if __name__ == "__main__":
    sys.modules["dualstream"] = None  # any import of it now fails, also where it is installed
    with open(sys.argv[1], encoding="utf-8") as file:
        given = json.load(file)
    print(json.dumps({folder: examine(folder, given) for folder in given["folders"]}))
