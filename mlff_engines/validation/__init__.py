"""The judge: checks that any engine, given as a callable, has to pass."""
