"""Which visual tokens carry the answer: ablation, logit lens, attention knockout (arXiv 2410.07149), with controls."""
