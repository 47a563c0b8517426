"""Structures worth labelling: where they come from and which are kept."""
