"""Pictures in, words out: image loading, processors, token geometry and token maps.

Names are imported on first use, so importing this package loads no torch::

    from dualstream.processing import TokenMap, load_image, token_geometry
"""

from __future__ import annotations

import importlib
from typing import Any

# Which file defines each public name.
_HOMES = {
    "geometry": ("token_geometry",),
    "images": ("load_image",),
    "inference": ("Answer", "answer_questions", "build_inputs", "read_image"),
    "patch_order": ("inverse", "merge_block_order", "places_of_tokens", "window_order", "window_token_order"),
    "processing_visual_decoder": (
        "InternVLWithVisualDecoderProcessor",
        "LlavaWithVisualDecoderProcessor",
        "Qwen2VLWithVisualDecoderProcessor",
        "Qwen2_5_VLWithVisualDecoderProcessor",
        "Qwen3VLWithVisualDecoderProcessor",
    ),
    "registration": ("register_processors",),
    "run_lengths": ("decode_runs", "encode_runs", "row_starts"),
    "token_boxes": ("Block", "TokenGeometry"),
    "token_map": ("Region", "Run", "TokenMap"),
    "words": ("decode_pieces", "has_meaning", "visible"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF[name]
    if home == "processing_visual_decoder":  # who uses our processors expects AutoProcessor to know them
        importlib.import_module(".registration", __name__).register_processors()
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
