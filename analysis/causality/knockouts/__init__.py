"""Edges of attention cut, and proved to be cut: on which routes the answer travels."""
