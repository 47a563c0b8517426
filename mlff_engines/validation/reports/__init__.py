"""The answer of a validation, for machines and for people."""
