"""Datasets built here: synthetic scenes with exact boxes, masks and balanced questions."""
