"""How cost grows, one variable at a time: measured points, fits held against FLOPs, and their figures."""

from .suite import figures, run

__all__ = ["figures", "run"]
