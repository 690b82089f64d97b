"""The study of RoPE scaling: what a scaled vision tower does to answers about where things are, with controls."""
