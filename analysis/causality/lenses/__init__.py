"""Which cells read as their object, against chance."""
