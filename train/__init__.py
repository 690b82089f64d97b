"""Training recipes: the tiny embedded models, from scratch on scenes."""
