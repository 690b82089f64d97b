"""Visual tokens replaced before the answer: which of them it needs."""
