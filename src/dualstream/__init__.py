"""Read what a vision-language model sees as text, cut its visual tokens, and fix its sense of left and right.

The code lives in sub-packages, one per folder of the repository: ``dualstream.modeling``, ``dualstream.processing``,
``dualstream.data_builders``, ``dualstream.train``, ``dualstream.eval``, ``dualstream.analysis``,
``dualstream.hub_cards`` and ``dualstream.benchmarks``. Importing this top level is cheap: it loads no torch.
"""

__version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for (PEP 562): that takes longer than everything else here."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dualstream")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
