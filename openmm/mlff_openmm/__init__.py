"""Run an artifact in OpenMM. Reserved for the adapter; nothing to import yet."""
