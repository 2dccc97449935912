# SPDX-License-Identifier: Apache-2.0
"""Load-Patch-Distribute: from a checkpoint into a module, each weight straight to its place."""

from distorch.loading.dry_run import plan
from distorch.loading.empty import init_empty_weights
from distorch.loading.loader import load

__all__ = ["init_empty_weights", "load", "plan"]
