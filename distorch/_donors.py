# SPDX-License-Identifier: Apache-2.0
"""Bytes onto donors: RAM, pinned memory, disk, other devices, and stripes over several of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from distorch import _native, _ops
from distorch.errors import PlacementError

_STRIPE_ALIGN = 4096  # stripes end at whole pages

# (donor, compute device) -> bytes per second, as far as links were measured.
link_rates: dict[tuple[str, str], float] = {}
_others_rates: ContextVar[Mapping[tuple[str, str], float] | None] = ContextVar(
    "others_rates", default=None
)


@contextmanager
def other_link_rates(rates: Mapping[tuple[str, str], float]) -> Iterator[None]:
    """Inside of the block, stripes of this thread are cut for the links of another machine."""
    before = _others_rates.set(rates)
    try:
        yield
    finally:
        _others_rates.reset(before)


def shard_on(tier: str, data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    """A sharded tensor with the bytes of `data`'s storage on a tier.

    `tier` is "cpu", "disk", a device ("cuda:1"), or several joined by "+" (stripes). Memory that
    is already there is adopted, unless copies need it pinned. Raises PlacementError.
    """
    if "+" in tier:
        return _striped(tier.split("+"), data, compute, name)
    if tier == "cpu":
        if compute.type == "cpu":
            return _ops.shard_host(data.cpu(), compute, name)
        return _pinned(data if data.is_meta else data.cpu(), compute, name)
    if tier == "disk":
        return _ops.shard_scratch(data, compute, name)
    device = _donor_device(tier, name)
    if device != compute:
        _native.set_peer_access(str(compute), str(device), _can_access_peer(compute, device))
    return _ops.shard_device(moved(data, device), compute, name)


def shard_within(
    slab: torch.Tensor, begin: int, data: torch.Tensor, compute: torch.device, name: str
) -> torch.Tensor:
    """A sharded tensor with the bytes of `data` (uint8, 1-D), in pinned memory that others share:
    `begin` bytes from the start of `slab`.
    """
    if not data.is_meta:
        slab[begin : begin + data.numel()].copy_(data)
    like = torch.empty(data.numel(), dtype=torch.uint8, device="meta")
    return _ops.shard_slab(slab, begin, like, compute, name)


def moved(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`data.to(device)`; of a tensor without values, room for them."""
    return torch.empty_like(data, device=device) if data.is_meta else data.to(device)


def stripe_sizes(nbytes: int, donors: Sequence[str], compute: str) -> list[int]:
    """Bytes for each donor, in proportion to what its link carries; whole pages but the last.

    If a link was not measured, all count alike.
    """
    others = _others_rates.get()
    known = link_rates if others is None else others
    measured = [known.get((donor, compute), 0.0) for donor in donors]
    rates = measured if all(measured) else [1.0] * len(donors)
    sizes: list[int] = []
    left = nbytes
    for index, own in enumerate(rates[:-1]):
        wanted = left * own / sum(rates[index:])
        sizes.append(min(left, round(wanted / _STRIPE_ALIGN) * _STRIPE_ALIGN))
        left -= sizes[-1]
    return [*sizes, left]


def _striped(
    donors: Sequence[str], data: torch.Tensor, compute: torch.device, name: str
) -> torch.Tensor:
    if len(set(donors)) != len(donors) or "disk" in donors:
        raise PlacementError(
            f"donor {'+'.join(donors)!r}: expected different devices or 'cpu'; a disk holds no "
            "stripes"
        )
    whole = _ops.byte_view(data)
    sizes = stripe_sizes(whole.numel(), donors, str(compute))
    parts = [
        shard_on(donor, piece.clone(), compute, name)
        for donor, piece in zip(donors, torch.split(whole, sizes), strict=True)
    ]
    return _ops.shard_striped(parts, data, compute, name)


def _pinned(data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    slab = _ops.pinned_memory(data.untyped_storage().nbytes(), compute)
    if not data.is_meta:
        slab.copy_(_ops.byte_view(data))
    return _ops.shard_slab(slab, 0, data, compute, name)


def _can_access_peer(compute: torch.device, donor: torch.device) -> bool:
    """Whether the donor can write to the compute device's memory: who copies is the source."""
    if compute.type != donor.type:
        return False
    asks = getattr(torch.get_device_module(compute), "can_device_access_peer", None)
    return asks is None or bool(asks(donor.index or 0, compute.index or 0))


def _donor_device(tier: str, name: str) -> torch.device:
    try:
        device = torch.device(tier)
        known = (device.index or 0) < torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):
        known = False
    if not known:
        raise PlacementError(
            f"donor {tier!r} for weight {name!r} is not there; expected 'cpu', 'disk' or a device "
            "of this machine, such as 'cuda:1'"
        )
    return device
