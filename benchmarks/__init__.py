"""Speed and memory, measured: stages, the limit, peers side by side, and how cost grows."""
