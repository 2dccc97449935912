"""LoRA files: from keys to patches, merged in float32 and rounded once."""

from distorch.lora.files import LoraSource
from distorch.lora.once import patches_of_tied
from distorch.lora.patches import (
    Applied,
    Patch,
    Patches,
    ResolvedLora,
    StoredRows,
    are_low_rank,
    low_rank_terms,
    merge,
)
from distorch.lora.resolve import LoraReader

__all__ = [
    "Applied",
    "LoraReader",
    "LoraSource",
    "Patch",
    "Patches",
    "ResolvedLora",
    "StoredRows",
    "are_low_rank",
    "low_rank_terms",
    "merge",
    "patches_of_tied",
]
