"""Model cards, exports, releases and the Space."""
