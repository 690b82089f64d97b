"""Read what a vision-language model sees as text, cut its visual tokens, and fix its sense of left and right.

The code lives in sub-packages, one per folder of the repository: ``dualstream.modeling``, ``dualstream.processing``,
``dualstream.data_builders``, ``dualstream.train``, ``dualstream.eval``, ``dualstream.analysis``,
``dualstream.hub_cards`` and ``dualstream.benchmarks``. Importing this top level is cheap: it loads no torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dualstream")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
