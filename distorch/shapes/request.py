# SPDX-License-Identifier: Apache-2.0
"""What a step is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from distorch.errors import SpecError

_MOST = 1 << 20


@dataclass(frozen=True)
class Request:
    """`size`: width and height of a picture in pixels. `frames` of a video. `tokens`: of a text;
    0 is what the model is usually given. `batch`: how many of them at once.
    """

    size: tuple[int, int] = (1024, 1024)
    frames: int = 81
    tokens: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            least = 0 if field.name == "tokens" else 1
            for number in value if field.name == "size" else (value,):
                whole = isinstance(number, int) and not isinstance(number, bool)
                if not whole or not least <= number <= _MOST:
                    raise SpecError(
                        f"{field.name}={value!r}: expected whole numbers from {least} to {_MOST}"
                    )


def empty(*shape: int) -> torch.Tensor:
    """A tensor of that shape without values."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
