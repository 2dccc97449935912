"""LoRA files: from keys to patches, merged in float32 and rounded once."""

from distorch.lora.files import LoraSource
from distorch.lora.patches import (
    LoraReader,
    Patch,
    Patches,
    ResolvedLora,
    StoredRows,
    are_low_rank,
    low_rank_terms,
    merge,
)

__all__ = [
    "LoraReader",
    "LoraSource",
    "Patch",
    "Patches",
    "ResolvedLora",
    "StoredRows",
    "are_low_rank",
    "low_rank_terms",
    "merge",
]
