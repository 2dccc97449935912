# SPDX-License-Identifier: Apache-2.0
"""Types of blocks that the compiled library decodes: their elements and bytes."""

from __future__ import annotations

from distorch.errors import FormatError
from distorch.formats.safetensors import DTYPES
from distorch.formats.stored import StoredTensor

# The number in a GGUF file -> name, elements of a block, bytes of a block.
GGUF_TYPES = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
# Blocks that are put together when a file is read (`packing`): name -> elements, bytes.
PACKED_TYPES = {
    "FP4x16": (16, 9), "FP8x32": (32, 33), "W4x16": (16, 9), "W6x16": (16, 13), "I4x16": (16, 8),
}  # fmt: skip
# Name -> elements, bytes of a block.
SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGUF_TYPES.values()} | PACKED_TYPES


def check_readable(stored: StoredTensor) -> None:
    """FormatError where a tensor has a type that this version does not decode."""
    if stored.block_type is not None and stored.block_type not in SIZES:
        known = [*DTYPES, *(name for name, _, _ in GGUF_TYPES.values())]
        raise FormatError(
            f"tensor {stored.name!r} in {stored.path!r} has the type {stored.block_type}, which "
            f"this version does not read; it reads {', '.join(known)}"
        )
