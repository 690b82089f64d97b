"""Speed and memory beside peers (reserved)."""
