"""LoRA files: from keys to patches, merged in float32 and rounded once."""

from distorch.lora.patches import LoraSource, Patches, read_loras

__all__ = ["LoraSource", "Patches", "read_loras"]
