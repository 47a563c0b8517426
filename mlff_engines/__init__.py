"""mlff-engines: learn a small fast force field from any teacher, export it once, run it in every engine."""

__version__ = "0.1.0"
