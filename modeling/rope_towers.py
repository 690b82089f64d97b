"""The vision towers with an axial rotary table, and where each keeps its frequencies.

Nearly all towers keep one buffer ``inv_freq`` of F frequencies that both axes share, and rotate by
``position_ids[..., None] * inv_freq`` with one column of positions per axis. What they differ in: which column counts
what, how one table is dealt out to the axes, and how the channels are ordered afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class RotaryTower:
    """How a tower's rotary module is laid out.

    Attributes:
        name: what the model is called.
        columns: what each column of the position ids counts; the temporal axis ``t`` is never scaled.
        form: ``axial``: buffer ``inv_freq``, which broadcasts against the columns; ``coordinates``: buffer
            ``inv_freq`` that only works shared by both axes; ``complex``: buffer ``freqs_ci`` of finished rotations.
        interleaved: one table of 2F frequencies is dealt out to the axes: even entries to h, odd ones to w.
        packed: position ids are (N, columns), image after image, each from (0, 0): the grid size can be read off them.
        casts: cos and sin take the dtype of the hidden states.
    """

    name: str
    columns: tuple[str, ...] = ("h", "w")
    form: str = "axial"
    interleaved: bool = False
    packed: bool = True
    casts: bool = False

    @property
    def buffer(self) -> str:
        """Name of the buffer that holds the frequencies or rotations."""
        return "freqs_ci" if self.form == "complex" else "inv_freq"

    def ratios(self, count: int) -> torch.Tensor:
        """Return the (F) ratios 2i/d of the stock frequencies, in the order of the buffer, float64."""
        ratios = torch.arange(count, dtype=torch.float64, device="cpu") / count
        return torch.cat([ratios[0::2], ratios[1::2]]) if self.interleaved else ratios


# One row per rotary class of transformers 5.23; a subclass of one of them counts as it.
ROTARY_TOWERS: dict[str, RotaryTower] = {
    "CohereCompassVisionRotaryEmbedding": RotaryTower("Cohere Compass"),
    "DINOv3ViTRopePositionEmbedding": RotaryTower("DINOv3", form="coordinates", packed=False),
    "Dots3NoteVisionRotaryEmbedding": RotaryTower("Dots3-Note"),
    "Ernie4_5_VLMoeVisionRotaryEmbedding": RotaryTower("ERNIE-4.5-VL"),
    "Exaone4_5_VisionRotaryEmbedding": RotaryTower("EXAONE-4.5"),
    "Gemma4VisionRotaryEmbedding": RotaryTower("Gemma 4", columns=("w", "h"), packed=False, casts=True),
    "Glm4vVisionRotaryEmbedding": RotaryTower("GLM-4V"),
    "Glm4vMoeVisionRotaryEmbedding": RotaryTower("GLM-4V-MoE"),
    "Glm5NextVisionRotaryEmbedding": RotaryTower("GLM-5-Next"),
    "GlmOcrVisionRotaryEmbedding": RotaryTower("GLM-OCR"),
    "Inkling2VisionRotaryEmbedding": RotaryTower("Inkling-2", packed=False),
    "Kimi_K25VisionRotaryEmbedding": RotaryTower("Kimi-K2.5"),
    "Lfm3VlVisionRotaryEmbedding": RotaryTower("LFM3-VL"),
    "Llama4VisionRotaryEmbedding": RotaryTower("Llama 4", columns=("w", "h"), form="complex", packed=False),
    "MLCDRotaryEmbedding": RotaryTower("MLCD"),
    "MiniMaxM3VLVisionRotaryEmbedding": RotaryTower(
        "MiniMax-M3-VL", columns=("t", "h", "w"), packed=False, casts=True
    ),
    "MuseGlimmerVisionRotaryEmbedding": RotaryTower("Muse Glimmer", columns=("w", "h"), packed=False, casts=True),
    "MuseSparkVisionRotaryEmbedding": RotaryTower("Muse Spark", columns=("w", "h"), packed=False, casts=True),
    "PaddleOCRVisionRotaryEmbedding": RotaryTower("PaddleOCR-VL"),
    "PixtralVisionRotaryEmbedding": RotaryTower("Pixtral", interleaved=True, casts=True),
    "Qwen2VLVisionRotaryEmbedding": RotaryTower("Qwen2-VL"),
    "Qwen2_5OmniVisionRotaryEmbedding": RotaryTower("Qwen2.5-Omni"),
    "Qwen2_5_VLVisionRotaryEmbedding": RotaryTower("Qwen2.5-VL"),
    "Qwen3OmniMoeVisionRotaryEmbedding": RotaryTower("Qwen3-Omni"),
    "Qwen3VLMoeVisionRotaryEmbedding": RotaryTower("Qwen3-VL-MoE"),
    "Qwen3VLVisionRotaryEmbedding": RotaryTower("Qwen3-VL"),
    "Qwen3_5MoeVisionRotaryEmbedding": RotaryTower("Qwen3.5-MoE"),
    "Qwen3_5VisionRotaryEmbedding": RotaryTower("Qwen3.5"),
    "Qwen4ExpVisionRotaryEmbedding": RotaryTower("Qwen4-Exp"),
    "Sam3ViTRotaryEmbedding": RotaryTower("SAM 3", columns=("w", "h"), packed=False),
    "Step3p7VisionRotaryEmbedding": RotaryTower("Step-3.7"),
    "VideoLlama3VisionRotaryEmbedding": RotaryTower("VideoLLaMA 3"),
}


def tower_of(module: nn.Module) -> RotaryTower | None:
    """Return the row of a rotary module, or None for any other module."""
    rows = (ROTARY_TOWERS.get(base.__name__) for base in type(module).__mro__)
    return next((row for row in rows if row is not None), None)


def vision_rotaries(model: nn.Module) -> dict[str, Any]:
    """Return the rotary modules of the vision tower by their dotted names.

    Raises:
        ValueError: there is none, naming the supported towers.
    """
    found = {name: module for name, module in model.named_modules() if tower_of(module) is not None}
    if not found:
        names = ", ".join(sorted(tower.name for tower in ROTARY_TOWERS.values()))
        raise ValueError(
            f"{type(model).__name__} has no vision tower with an axial rotary table; supported are the towers of "
            f"{names}. A tower with learned or one-dimensional positions (CLIP, SigLIP, InternViT, ...) has no "
            "frequencies to scale."
        )
    return found


def stock_frequencies(module: Any) -> torch.Tensor:
    """Return the (F) float32 frequencies that the configuration asks for, whatever the buffer holds."""
    tower: Any = tower_of(module)
    config = module.config
    if tower.form == "axial":
        return module.compute_axial_rope_parameters(config)[0].float()
    head_dim = config.hidden_size // config.num_attention_heads
    if tower.form == "coordinates":
        return 1 / config.rope_theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32)
    ratios = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)
    return 1 / config.rope_parameters["rope_theta"] ** ratios
