"""Run an artifact in LAMMPS. Reserved for the adapter; nothing to import yet."""
