"""Residual flow: how far a shallow state of the tower is from what its connector was trained on.

Pushing V_j through the connector assumes that the later blocks add to the residual stream and do not turn it round.
The figures say how well that holds: cosine and norm ratio of the tower's states, and of the connector's features, to
those of the native depth, token by token; the mean token of the picture is taken off before cosines, which otherwise
only show what all tokens share. ``norm_factors`` scale the features of a depth to the norm of the native ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.modeling.families import family_of, flatten_features
from dualstream.modeling.vision_depths import native_vision_depth, visit_vision_depths
from dualstream.processing import build_inputs
from dualstream.processing.inference import READING_PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image

FIGURES = ("state_cosine", "state_norm_ratio", "feature_cosine", "feature_norm_ratio")


def flow_figures(model: Any, processor: Any, batches: Iterable[Sequence[Image]]) -> dict[str, np.ndarray]:
    """Measure pictures; all depths of one batch are held, so give small ones.

    Args:
        model: the model, without a PEFT wrapper.
        processor: its processor.
        batches: of RGB pictures.

    Returns:
        Each of ``FIGURES`` -> (pictures, L_V + 1) float64.
    """
    native = native_vision_depth(model)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
    for images in batches:
        inputs = build_inputs(processor, list(images), [READING_PROMPT] * len(images))
        inputs.pop("compression", None)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_: int, states: torch.Tensor, output: Any, seen: list[Any] = seen) -> None:
            seen.append((states.float().cpu().clone(), flatten_features(output.pooler_output).float().cpu().clone()))

        depths = range(len(family_of(model).vision_blocks(model)) + 1)
        grids, index = visit_vision_depths(model, inputs.to(model.device), depths, keep)
        sizes = [int(grids[index == number].prod(-1).sum()) for number in range(len(images))]
        for kind, place in (("state", 0), ("feature", 1)):
            stacked = torch.stack([item[place] for item in seen]).split(sizes, dim=1)
            for states in stacked:
                cosine, ratio = _compare(states, native)
                rows[f"{kind}_cosine"].append(cosine)
                rows[f"{kind}_norm_ratio"].append(ratio)
    return {name: np.stack(values) for name, values in rows.items()}


def norm_factors(figures: dict[str, np.ndarray]) -> dict[int, float]:
    """Vision depth -> factor that brings the mean norm of the features to that of the native depth."""
    return {depth: float(1 / ratio) for depth, ratio in enumerate(figures["feature_norm_ratio"].mean(0))}


def _compare(states: torch.Tensor, native: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine and norm ratio (J,) of states (J, N, d) to those of the native depth."""
    centred = states - states.mean(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(centred, centred[native][None], dim=-1).mean(1)
    norms = states.norm(dim=-1).mean(1)
    return cosine.double().numpy(), (norms / norms[native]).double().numpy()
