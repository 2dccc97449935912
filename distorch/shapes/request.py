# SPDX-License-Identifier: Apache-2.0
"""What a step is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from distorch.errors import SpecError

_MOST = 1 << 20


@dataclass(frozen=True)
class Request:
    """`size`: width and height of a picture in pixels. `frames` of a video. `tokens` of a text.
    `batch`: how many of them at once. None: the model has none of these.
    """

    size: tuple[int, int] | None = None
    frames: int | None = None
    tokens: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if value is None:
                continue
            for number in value if field.name == "size" else (value,):
                whole = isinstance(number, int) and not isinstance(number, bool)
                if not whole or not 1 <= number <= _MOST:
                    raise SpecError(
                        f"{field.name}={value!r}: expected whole numbers from 1 to {_MOST}"
                    )

    def with_given(self, **given: Any) -> Request:
        """The same with what is not None. SpecError if the model has none of that."""
        wanted = {name: value for name, value in given.items() if value is not None}
        if absent := [name for name in wanted if getattr(self, name) is None]:
            raise SpecError(f"{absent[0]}= is nothing that this model has; leave it out")
        return replace(self, **wanted)

    def __str__(self) -> str:
        size = "" if self.size is None else f"{self.size[0]}x{self.size[1]} pixels, "
        frames = "" if self.frames is None else f"{self.frames} frames, "
        return f"{size}{frames}{self.tokens} tokens of text, batch {self.batch}"


def empty(*shape: int) -> torch.Tensor:
    """A tensor of that shape without values."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
