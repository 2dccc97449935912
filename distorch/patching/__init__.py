"""LoRAs on a distributed module: where the originals are, what is on them, and how that changes."""

from distorch.patching.background import Merging, finish_merging
from distorch.patching.change import set_loras
from distorch.patching.forms import merged_value, with_rows
from distorch.patching.state import (
    Applied,
    Original,
    Patching,
    PatchOptions,
    base_name,
    check_plain_numbers,
    new_reader,
)

__all__ = [
    "Applied", "Merging", "Original", "PatchOptions", "Patching", "base_name",
    "check_plain_numbers", "finish_merging", "merged_value", "new_reader", "set_loras", "with_rows",
]  # fmt: skip
