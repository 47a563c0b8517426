"""How fast: the model alone and whole MD steps, ours and other packages', side by side."""
