"""The published table on RoPE scaling, for its own column: other models, other pictures, chosen on the test sets.

Source: Table 2 of "Reading Images Like Texts" (arXiv 2509.19191): accuracy in percent of single pictures.
"""

from __future__ import annotations

BENCHMARKS = ("What's Up A", "What's Up B", "COCO-spatial", "GQA-spatial")
NOT_PUBLISHED = None
# (arm, tuned) -> model -> accuracies in the order of BENCHMARKS
TABLE_2: dict[tuple[str, bool], dict[str, tuple[float, ...] | None]] = {
    ("stock", False): {"Qwen2-VL-2B": (74.61, 53.16, 49.84, 76.61), "Qwen2-VL-7B": (98.06, 87.84, 88.79, 92.84)},
    ("scaled", False): {"Qwen2-VL-2B": (77.27, 58.25, 50.24, 78.22), "Qwen2-VL-7B": (98.86, 88.97, 89.27, 94.31)},
    ("stock", True): {"Qwen2-VL-2B": (78.54, 61.52, 58.08, 81.29), "Qwen2-VL-7B": NOT_PUBLISHED},
    ("scaled", True): {"Qwen2-VL-2B": (79.42, 63.48, 59.03, 82.24), "Qwen2-VL-7B": (99.03, 90.44, 89.67, 96.98)},
}


def published_cell(arm: str, tuned: bool, model: str = "Qwen2-VL-2B") -> str:
    """An arm's published accuracies as one cell of a table, empty where there are none."""
    values = TABLE_2.get((arm, tuned), {}).get(model)
    return "" if values is None else " / ".join(f"{value:.2f}" for value in values)
