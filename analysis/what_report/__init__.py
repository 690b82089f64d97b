"""Pages of what pictures read as by depth: one self-contained file per picture, and an index of a folder."""
