# SPDX-License-Identifier: Apache-2.0
"""Sampling digits and writing them as a picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distorch._small_files import write_atomically
from distorch.demo.model import DigitTransformer

Bytes2D = NDArray[np.uint8]


@torch.no_grad()
def sample(
    model: DigitTransformer,
    labels: Tensor,
    *,
    steps: int = 24,
    guidance: float = 2.0,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Digits for `labels` [n] as images [n, 1, size, size] in -1..1, on the model's device.

    Euler steps of the learned flow from noise (time 0) to image (time 1); two passes a step, with
    and without the label (classifier-free guidance, Ho and Salimans, 2022). Deterministic: the
    noise is drawn on the CPU, so that a seed means the same noise on every device.
    """
    size, weight = model.config.image, model.embed.weight
    labels = labels.to(weight.device)
    noise = torch.randn(len(labels), 1, size, size, generator=torch.Generator().manual_seed(seed))
    images = noise.to(weight.device, weight.dtype)
    nothing = torch.full_like(labels, model.no_label)
    for step in range(steps):
        times = torch.full((len(labels),), step / steps, device=labels.device)
        with_label = model(images, times, labels)
        without = model(images, times, nothing)
        images = images + (without + guidance * (with_label - without)) / steps
        on_step()
    return images.float().clamp(-1, 1)


def sheet(images: Tensor, columns: int = 10, scale: int = 8) -> Bytes2D:
    """Images [n, 1, size, size] in -1..1 as one grey picture, ink dark on white paper.

    A last row that is not full is filled up with empty paper (-1).
    """
    missing = -len(images) % columns if len(images) > columns else 0
    images = torch.nn.functional.pad(images.cpu(), (0,) * 7 + (missing,), value=-1.0)
    grown = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic")
    grey = (255 * (1 - (grown.clamp(-1, 1) + 1) / 2)).round().to(torch.uint8)[:, 0]
    edge = scale // 2
    padded = torch.nn.functional.pad(grey, (edge, edge, edge, edge), value=255).numpy()
    rows = [
        np.concatenate(list(padded[i : i + columns]), axis=1)
        for i in range(0, len(padded), columns)
    ]
    picture: Bytes2D = np.concatenate(rows, axis=0)
    return picture


def save_png(path: str | Path, picture: Bytes2D) -> None:
    """Writes a grey picture [height, width] as PNG (8 bits, no interlace)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    height, width = picture.shape
    lines = b"".join(b"\0" + picture[row].tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    write_atomically(Path(path), b"\x89PNG\r\n\x1a\n" + body)
