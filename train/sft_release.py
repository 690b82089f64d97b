"""Turn a trained model into a folder that others load: merged, in its dtype, with processor, card and record."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dualstream.eval.manifest import write_json
from dualstream.modeling import EMBEDDED_MODELS, default_model_path, freeze_rope_scaling

from .sft_config import VisionSFTConfig

RELEASE, FACTS = "release", "training.json"


def write_release(model: Any, processor: Any, config: VisionSFTConfig, folder: Path, record: dict[str, Any]) -> Path:
    """Write ``release/`` into a run folder, all of it or nothing.

    Args:
        model: the trained model, possibly wrapped by PEFT; it is changed.
        processor: with the resolution that was trained on.
        config: the run's settings.
        folder: the run folder.
        record: facts for the card and ``training.json``.

    Returns:
        The folder of the release.
    """
    partial, target = folder / f"{RELEASE}.partial", folder / RELEASE
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    if hasattr(model, "peft_config") and config.merge:
        model = model.merge_and_unload(safe_merge=True)
    if not hasattr(model, "peft_config"):
        _finish(model, config)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    write_json(partial / FACTS, record)
    (partial / "README.md").write_text(card(model, config, record), encoding="utf-8")
    os.replace(partial, target)
    return target


def _finish(model: Any, config: VisionSFTConfig) -> None:
    """Settle what training left open: learned tables, dtype, the default of compression."""
    if config.rope_scaling is not None:
        freeze_rope_scaling(model)
    model.requires_grad_(False)
    model.to(_release_dtype(config))
    if config.compression is not None and hasattr(model.config, "visual_compression"):
        model.config.visual_compression = config.compression


def _release_dtype(config: VisionSFTConfig) -> torch.dtype:
    if config.release_dtype != "auto":
        return getattr(torch, config.release_dtype)
    source = default_model_path(config.model) if config.model in EMBEDDED_MODELS else config.model
    options = {} if config.model_revision is None else {"revision": config.model_revision}
    return AutoConfig.from_pretrained(source, **options).dtype or torch.float32


def card(model: Any, config: VisionSFTConfig, record: dict[str, Any]) -> str:
    """The text of the release's README.md."""
    import yaml

    from .sft_parts import PartRow, format_table

    remote = bool(getattr(model.config, "auto_map", None))
    header: dict[str, Any] = {
        "library_name": "peft" if hasattr(model, "peft_config") else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["dualstream", "sft", "trl"],
    }
    if config.model.count("/") == 1 and not config.model.startswith((".", "/")):
        header["base_model"] = config.model
    if config.dataset.count("/") == 1 and not config.dataset.startswith((".", "/")):
        header["datasets"] = [config.dataset]
    table = format_table([PartRow(**row) for row in record["trained"]])
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in record["validation"].items()) or "| none | |"
    settings = {name: value for name, value in record["facts"].items() if value is not None}
    code = ", trust_remote_code=True" if remote else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {Path(config.model).name}, fine-tuned

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("REPO_OR_FOLDER"{code})
processor = AutoProcessor.from_pretrained("REPO_OR_FOLDER"{code})  # with the resolution that was trained on
```

What was trained, for {record["steps"]} steps on {record["rows"]["train"]} rows of `{Path(config.dataset).name}`:

```
{table}
```

| last validation ({record["rows"]["validation"]} rows) | |
|---|---|
{figures}

Accuracies are of the likeliest token given all that is right before it; `answer` counts whole answers.

```json
{json.dumps(settings, indent=2)}
```

Versions, seed and all settings: `{FACTS}`. Made with `dualstream train sft`.
"""
