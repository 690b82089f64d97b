"""Other ways to spend fewer visual tokens, on the same prompt in one run: each as fast as its idea allows."""

from .depth import Depths
from .suite import peers_of, run

__all__ = ["Depths", "peers_of", "run"]
