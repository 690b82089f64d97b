"""Run as a script by test_release: use a released model or dataset from the Hub where dualstream cannot be imported.

Usage: python load_from_hub.py model|dataset REPO_ID REVISION [IMAGE]
"""

import importlib.abc
import json
import sys


class NoDualstream(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dualstream":
            raise ModuleNotFoundError(name)
        return None


sys.meta_path.insert(0, NoDualstream())


def use_model(repo_id, revision, image):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    options = {"revision": revision, "trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(repo_id, **options)
    processor = AutoProcessor.from_pretrained(repo_id, **options)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "How many objects are there?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    piped = pipeline("image-text-to-text", model=repo_id, **options)
    text = piped(text=chat, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
    report = getattr(model, "last_compression", None)
    return {
        "class": type(model).__name__,
        "ids": ids[0].tolist(),
        "kept": None if report is None else report.kept_tokens,
        "piped": text[0]["generated_text"].strip(),
        "said": processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip(),
    }


def use_dataset(repo_id, revision, _=None):
    from datasets import load_dataset

    rows = load_dataset(repo_id, split="test", revision=revision)
    streamed = list(load_dataset(repo_id, split="test", revision=revision, streaming=True))
    same = [row["image_id"] for row in rows] == [row["image_id"] for row in streamed]
    return {"rows": len(rows), "first": rows[0], "streamed alike": same}


kind, *arguments = sys.argv[1:]
print(json.dumps({"model": use_model, "dataset": use_dataset}[kind](*arguments)))
