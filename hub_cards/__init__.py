"""Model and dataset cards, releases and the Space (reserved)."""
