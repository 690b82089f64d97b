"""POPE's questions as a typed dataset: which object, in which picture, there or not."""
