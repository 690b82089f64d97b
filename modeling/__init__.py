"""Visual decoder, compression of visual tokens and the model classes that carry both; what ships to the Hub.

Names are imported on first use, so importing this package loads no torch::

    from dualstream.modeling import compressing, load_model
"""

from __future__ import annotations

import importlib
from typing import Any

# Which file defines each public name.
_HOMES = {
    "auto": ("EMBEDDED_MODELS", "default_model_path", "infer_class", "load_model"),
    "compressed_model": ("VisualCompressionMixin",),
    "compression_context": ("compressing",),
    "compression_report": ("CompressionReport", "EncodedImages", "ImageCompression", "Planner"),
    "configuration_rope_scaled": (
        "Qwen2VLRopeScaledConfig",
        "Qwen2_5_VLRopeScaledConfig",
        "Qwen3VLRopeScaledConfig",
    ),
    "configuration_visual_decoder": (
        "InternVLWithVisualDecoderConfig",
        "LlavaWithVisualDecoderConfig",
        "Qwen2VLWithVisualDecoderConfig",
        "Qwen2_5_VLWithVisualDecoderConfig",
        "Qwen3VLWithVisualDecoderConfig",
    ),
    "decoder_tables": ("token_tables",),
    "families": ("FAMILIES", "Family", "family_of"),
    "lens": ("VisualReading", "image_features_and_states", "read_visual_tokens", "visual_features"),
    "modeling_internvl_visual_decoder": ("InternVLWithVisualDecoder",),
    "modeling_llava_visual_decoder": ("LlavaWithVisualDecoder",),
    "modeling_qwen2_5_vl_rope_scaled": ("Qwen2_5_VLRopeScaled",),
    "modeling_qwen2_5_vl_visual_decoder": ("Qwen2_5_VLWithVisualDecoder",),
    "modeling_qwen2_vl_rope_scaled": ("Qwen2VLRopeScaled",),
    "modeling_qwen2_vl_visual_decoder": ("Qwen2VLWithVisualDecoder",),
    "modeling_qwen3_vl_rope_scaled": ("Qwen3VLRopeScaled",),
    "modeling_qwen3_vl_visual_decoder": ("Qwen3VLWithVisualDecoder",),
    "prompt_plan": ("PromptPlan", "plan_prompt"),
    "rope_formulas": ("RopeScaling",),
    "rope_scaling": (
        "apply_rope_scaling",
        "freeze_rope_scaling",
        "frequency_ratios",
        "remove_rope_scaling",
        "rope_scaled",
        "rope_scaling_of",
    ),
    "rope_towers": ("ROTARY_TOWERS", "RotaryTower"),
    "visual_compression": (
        "METHODS",
        "POOLINGS",
        "POSITION_POLICIES",
        "CompressionConfig",
        "RunLengthPlan",
        "merge_features",
        "run_length_plan",
    ),
    "visual_decoder": ("VisualDecoder",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF[name]
    if home.startswith(("configuration_", "modeling_")):
        importlib.import_module(".auto", __name__)  # who uses our classes expects AutoModel and the like to know them
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
