"""arXiv 2410.07149 as its public code runs it, and mended, side by side."""
