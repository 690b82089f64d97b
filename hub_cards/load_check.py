"""Run as a script: load a folder as somebody would who has no dualstream, and print what was found as JSON.

Usage: python load_check.py model|dataset FOLDER. Weights go to the meta device, so that size does not matter.
"""

import importlib.abc
import json
import sys


class NoDualstream(importlib.abc.MetaPathFinder):
    """Makes ``import dualstream`` fail, as it does where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse this package and leave all others to the next finder."""
        if name.split(".")[0] == "dualstream":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def load_model(folder):
    """Class, module and the keys that were lost, of the model and its processor."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    auto_map = getattr(config, "auto_map", None) or {}
    remote = auto_map and "AutoModelForImageTextToText" not in auto_map
    auto_class = AutoModel if remote else AutoModelForImageTextToText
    if getattr(config, "weights_from", None):  # the weights lie on the Hub, where this process cannot look
        import torch

        with torch.device("meta"):
            model = auto_class.from_config(config, **trust)
        processor = AutoProcessor.from_pretrained(folder, **trust)
        found = {"model": type(model).__name__, "processor": type(processor).__name__}
        return {**found, "weights_from": config.weights_from}
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, device_map="meta", **trust)
    lost = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    return {"model": type(model).__name__, "processor": type(processor).__name__, **lost}


def load_dataset(folder):
    """Rows of every configuration and split; the first row of each is decoded."""
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for config in datasets.get_dataset_config_names(folder):
            splits = datasets.load_dataset(folder, config, cache_dir=cache)
            found[config] = {name: len(rows) for name, rows in splits.items()}
            for rows in splits.values():
                if len(rows):
                    rows[0]
    return {"rows": found}


if __name__ == "__main__":
    sys.meta_path.insert(0, NoDualstream())
    kind, folder = sys.argv[1:]
    print(json.dumps({"model": load_model, "dataset": load_dataset}[kind](folder)))
