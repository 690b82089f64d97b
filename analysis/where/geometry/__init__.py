"""Where position is in the states: geometry of places, and how far a place can be read."""
