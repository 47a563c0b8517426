"""Motion: trajectories at constant energy and in ensembles, against theory and the eager model (M1-M7)."""
