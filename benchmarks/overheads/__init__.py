"""What surrounds a forward pass: corpora, sweeps, option scores and lmms-eval, per image beside bare passes."""
