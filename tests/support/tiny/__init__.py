"""Pipelines of the real classes with random weights, built from configurations: a few megabytes, no download."""
