"""BENCHMARKS.md, rendered from records and from nothing else."""
