"""The "what" pathway of arXiv 2509.19191, section 3: how a picture turns into words, depth by depth."""
