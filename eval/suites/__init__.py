"""``dualstream eval``: suites of benchmarks, run arm by arm through lmms-eval, compared on the same samples."""
