"""Accuracy on held-out questions, the intervals that go with every figure, and what identifies a run."""
