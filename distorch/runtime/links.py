"""Links between donors and compute devices: what they carry, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distorch import _ops
from distorch.errors import PlacementError

_STRIPE_ALIGN = 4096  # stripes end at whole pages


def rate(donor: str, compute: str) -> float:
    """Measured bytes per second of a link; 1.0 for links that nobody calibrated."""
    return 1.0


def stripe_sizes(nbytes: int, donors: Sequence[str], compute: str) -> list[int]:
    """Bytes for each donor, in proportion to what its link carries; whole pages but the last."""
    rates = [rate(donor, compute) for donor in donors]
    sizes: list[int] = []
    left = nbytes
    for index, own in enumerate(rates[:-1]):
        wanted = left * own / sum(rates[index:])
        sizes.append(min(left, round(wanted / _STRIPE_ALIGN) * _STRIPE_ALIGN))
        left -= sizes[-1]
    return [*sizes, left]


def striped(
    values: torch.Tensor, donors: Sequence[str], compute: torch.device, name: str
) -> torch.Tensor:
    """A sharded tensor with the bytes of `values`' storage spread over several donors."""
    if len(set(donors)) != len(donors) or "disk" in donors:
        raise PlacementError(
            f"donor {'+'.join(donors)!r}: expected different devices or 'cpu'; a disk holds no "
            "stripes"
        )
    data = _ops.byte_view(values)
    sizes = stripe_sizes(data.numel(), donors, str(compute))
    pairs = zip(donors, data.split(sizes), strict=True)
    parts = [
        _ops.shard_on(donor, piece.clone(), compute, name)
        for donor, piece in pairs
        if piece.numel() > 0
    ]
    return _ops.shard_striped(parts, values, compute, name)
