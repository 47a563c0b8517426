"""What trajectories show, whoever wrote them."""
