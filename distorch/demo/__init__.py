"""The demo: a digit transformer with most of its weights on disk."""
