"""Token-map corpora: pictures of any source, read as text at several depths of a model, as a dataset to load.

    dualstream build token-maps --model tiny-llava --images scenes:test:1000 --out maps

Names are imported on first use::

    from dualstream.data_builders.token_maps import compare_corpora, token_map_of_row
"""

from __future__ import annotations

import importlib
from typing import Any

# Which file defines each public name.
_HOMES = {
    "build": ("BuildOptions", "BuildReport", "build_shards", "open_corpus"),
    "card": ("CardFields", "finalize", "is_finalized"),
    "compare": ("CorpusComparison", "compare_corpora"),
    "images": ("image_hash",),
    "reading": ("MapReader",),
    "schedule": ("Share",),
    "schema": ("features", "token_map_of_row"),
    "shards": ("CorpusFolder",),
    "sources": ("ImageSource", "open_source"),
    "throughput": ("measure_throughput",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
