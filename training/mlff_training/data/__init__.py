"""Labelled structures: files, units, checks, splits and graphs."""
