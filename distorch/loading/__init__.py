"""Load-Patch-Distribute: from a checkpoint into a module, each weight straight to its place."""

from distorch.loading.loader import load

__all__ = ["load"]
