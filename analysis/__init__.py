"""Experiments on a frozen model, and the commands that look at one: read, ask, demo, doctor."""
