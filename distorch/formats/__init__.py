"""Checkpoint files: what is in them and where, without reading the weights."""
