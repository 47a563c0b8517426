"""Teachers, near and far, and the labels they give."""
