"""Architectures: one file each, from a graph to per-atom energies."""
