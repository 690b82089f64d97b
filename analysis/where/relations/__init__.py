"""Relation vectors between two objects, probes of them, and what the published measures are worth."""
