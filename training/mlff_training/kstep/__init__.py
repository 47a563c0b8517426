"""Jumps of k steps: pairs from trajectories, and the training of the networks that make them."""
