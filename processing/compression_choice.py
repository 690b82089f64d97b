"""Check a compression choice before it travels with a batch to the model.

Processor files are copied into checkpoints without the modeling folder, so the accepted values are repeated here; a
test compares them with the model's own.
"""

from __future__ import annotations

from typing import Any

METHODS = ("none", "rle", "rle_drop_top1", "rle_drop_top2")
PAPER_PREFIX = "paper:"
# Accepted values of every option; None stands for any number.
OPTIONS: dict[str, tuple[Any, ...] | None] = {
    "method": METHODS,
    "pooling": ("mean", "first", "random"),
    "position_policy": ("original", "compact"),
    "wrap_rows": (False, True),
    "compare": ("id", "text"),
    "drop_scope": ("run", "first"),
    "min_keep": None,
    "seed": None,
}

Choice = str | dict[str, Any] | None


def plain_choice(compression: Any) -> Choice:
    """Return a compression choice as a plain value that fits into JSON and through `generate(**inputs)`.

    Args:
        compression: None (say nothing), a method name, "paper:" and a method name, a dict of options, or the
            `CompressionConfig` of the model.

    Returns:
        None, the name, or a dict.

    Raises:
        ValueError: for an unknown method, option or value, naming the accepted ones.
    """
    if compression is None:
        return None
    if isinstance(compression, str):
        _require("method", compression.removeprefix(PAPER_PREFIX), METHODS, shown=compression)
        return compression
    options = compression if isinstance(compression, dict) else getattr(compression, "to_dict", dict)()
    if not options:
        raise ValueError(
            f"compression={compression!r} is not understood; give None, one of {', '.join(METHODS)}, "
            f"'{PAPER_PREFIX}<method>', or a dict with options among {', '.join(OPTIONS)}."
        )
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"compression option {name!r} is unknown; choose among {', '.join(OPTIONS)}.")
        if (accepted := OPTIONS[name]) is not None:
            _require(name, value, accepted, shown=value)
    return dict(options)


def _require(name: str, value: Any, accepted: tuple[Any, ...], shown: Any) -> None:
    """Raise ValueError unless the value is accepted."""
    if value not in accepted:
        choices = ", ".join(str(choice) for choice in accepted)
        raise ValueError(f"compression {name} {shown!r} is unknown; choose one of {choices}.")
