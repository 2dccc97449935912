# SPDX-License-Identifier: Apache-2.0
"""LoRA files: from keys to patches, merged in float32 and rounded once."""

from distorch.lora.around import padded
from distorch.lora.files import LoraFile, LoraSource, identity_of, parts_of_lora, read_lora
from distorch.lora.once import patches_of_tied
from distorch.lora.patches import (
    Applied,
    Patch,
    Patches,
    ResolvedLora,
    StoredRows,
    are_products,
    low_rank_terms,
    merge,
)
from distorch.lora.resolve import LoraReader, checked_loras
from distorch.lora.targets import WeightKinds

__all__ = [
    "Applied",
    "LoraFile",
    "LoraReader",
    "LoraSource",
    "Patch",
    "Patches",
    "ResolvedLora",
    "StoredRows",
    "WeightKinds",
    "are_products",
    "checked_loras",
    "identity_of",
    "low_rank_terms",
    "merge",
    "padded",
    "parts_of_lora",
    "patches_of_tied",
    "read_lora",
]
