# SPDX-License-Identifier: Apache-2.0
"""A distributed model in words and as a picture: what is where, what travelled, how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import distorch
from distorch._tables import human_bytes
from distorch.comfy.patcher import placed
from distorch.runtime import distribution

WIDTH, _BAR, _LINE, _EDGE = 960, 34, 16, 16  # pixels
_COLOURS = ((64, 133, 244), (240, 160, 60), (120, 190, 90), (190, 90, 190), (230, 90, 90))
_GREY = (90, 90, 90)


@dataclass(frozen=True)
class Found:
    """A measured model: bytes per device (the compute device first), the layers in order with
    theirs, what travelled since the last report and the `seconds` of sampling since.
    """

    title: str
    spec: str
    bytes: dict[str, int]
    ring: int
    layers: list[tuple[str, dict[str, int]]]
    problems: list[str]
    stats: distorch.Stats
    seconds: float
    text: str

    @property
    def rates(self) -> dict[str, float]:
        """Link -> GB/s (10^9), over the time that was spent sampling."""
        return {k: n / self.seconds / 1e9 for k, n in self.stats.bytes.items() if self.seconds > 0}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "model": self.title,
            "spec": self.spec,
            "bytes": self.bytes,
            "ring": self.ring,
            "ok": not self.problems,
            "problems": self.problems,
            "fetches": self.stats.fetches,
            "hits": self.stats.hits,
            "stall_seconds": self.stats.stall_seconds,
            "travelled": self.stats.bytes,
            "gb_per_second": self.rates,
        }


def measured(patcher: Any) -> Found:
    """Measures the model of a placed patcher, and starts counting anew."""
    model = patcher.model
    if not distribution.is_distributed(model):
        plan = distorch.plan(model, *_request(patcher)[:1], **_request(patcher)[1])
        empty = distorch.Stats(0, 0, 0.0, 0, {})
        text = f"{type(model).__name__}: not loaded yet\n{plan}"
        return Found(type(model).__name__, patcher.placement.spec, {}, 0, [], [], empty, 0.0, text)
    report, stats = distorch.report(model), distorch.stats(model)
    ring = distribution.distribution_of(model).ring_bytes
    state = placed(model)
    seconds, state.sampling_seconds = state.sampling_seconds, 0.0
    distorch.reset_stats(model)
    lines = [str(report), "", f"ring: {human_bytes(ring)}", str(stats)]
    if seconds:
        rates = {link: nbytes / seconds / 1e9 for link, nbytes in stats.bytes.items()}
        lines += [
            f"{link}: {rate:.2f} GB/s over {seconds:.1f} s of sampling"
            for link, rate in rates.items()
        ]
    return Found(
        type(model).__name__,
        patcher.placement.spec,
        dict(report.bytes),
        ring,
        list(report.layers.items()),
        list(report.problems),
        stats,
        seconds,
        "\n".join(lines),
    )


def _request(patcher: Any) -> tuple[str, dict[str, Any]]:
    return patcher._request(None)


def picture(found: Found) -> torch.Tensor:
    """An image [1, height, width, 3], float32 0..1: the bar of the model, one row per layer, and
    the table below.
    """
    layers = _merged(found.layers, most=48)
    lines = found.text.splitlines()
    height = 2 * _EDGE + _LINE * 2 + _BAR + 8 * len(layers) + _LINE * (len(lines) + 2)
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    # Every letter as wide as the next, for tables; newer versions have another default.
    draw.font = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(found.bytes)}
    y = _EDGE
    draw.text((_EDGE, y), f"{found.title}   {found.spec}", fill="black")
    y += _LINE
    _bar(draw, y, _BAR, found.bytes, sum(found.bytes.values()), colours)
    y += _BAR + 4
    x = _EDGE
    for name, nbytes in found.bytes.items():
        label = f"{name} {human_bytes(nbytes)}"
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=colours[name])
        draw.text((x + 14, y), label, fill="black")
        x += 30 + int(draw.textlength(label))
    for link, rate in found.rates.items():
        label = f"{link} {rate:.2f} GB/s"
        draw.text((x, y), label, fill=_GREY)
        x += 16 + int(draw.textlength(label))
    y += _LINE + 4
    largest = max((sum(parts.values()) for _, parts in layers), default=0)
    for _, parts in layers:
        _bar(draw, y, 6, parts, largest, colours)
        y += 8
    y += _LINE // 2
    for line in lines:
        draw.text((_EDGE, y), line, fill="red" if "planned on" in line else "black")
        y += _LINE
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def _bar(
    draw: Any, y: int, height: int, parts: dict[str, int], whole: int,
    colours: dict[str, tuple[int, int, int]],
) -> None:  # fmt: skip
    x, room = float(_EDGE), WIDTH - 2 * _EDGE
    for name, nbytes in parts.items():
        width = room * nbytes / max(whole, 1)
        if width > 0:
            draw.rectangle((x, y, x + width, y + height), fill=colours[name])
        x += width


def _merged(
    layers: list[tuple[str, dict[str, int]]], most: int
) -> list[tuple[str, dict[str, int]]]:
    """At most so many rows: neighbours together."""
    size = -(-len(layers) // most) or 1
    rows = []
    for begin in range(0, len(layers), size):
        group = layers[begin : begin + size]
        parts: dict[str, int] = {}
        for _, own in group:
            for name, nbytes in own.items():
                parts[name] = parts.get(name, 0) + nbytes
        rows.append((group[0][0], parts))
    return rows
