# SPDX-License-Identifier: Apache-2.0
"""LoRAs on a distributed module: where the originals are, what is on them, and how that changes."""

from distorch.patching.background import finish_merging, merge_in_background
from distorch.patching.change import set_loras
from distorch.patching.forms import merged_value, with_rows
from distorch.patching.state import (
    LoraMode,
    Original,
    Patching,
    PatchOptions,
    check_plain_numbers,
    new_reader,
    patches_on,
    widened_in,
)
from distorch.patching.widths import follow as follow_widths

__all__ = [
    "LoraMode", "Original", "PatchOptions", "Patching", "check_plain_numbers",
    "finish_merging", "follow_widths", "merge_in_background", "merged_value", "new_reader",
    "patches_on", "set_loras", "widened_in",
    "with_rows",
]  # fmt: skip
