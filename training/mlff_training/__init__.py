"""Make a student: teachers, sampling, labels, data sets, losses and the training loop."""
