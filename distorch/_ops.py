# SPDX-License-Identifier: Apache-2.0
"""Typed names for the operators of the compiled library: the only user of torch.ops.distorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, cast

import torch

from distorch import _native
from distorch.errors import PlacementError

_ops = torch.ops.distorch


class WeightState(NamedTuple):
    """What the engine knows of a sharded tensor's storage."""

    id: int
    nbytes: int  # on the donor
    tier: str  # "cpu" or "disk"
    where: str  # in words, for messages
    read_only: bool  # somebody's checkpoint, never written
    name: str
    code: str  # how rows are stored if a fetch decodes them ("float8_e4m3fn"), else ""
    factor_bytes: int  # of scales and patches that a fetch needs, on the compute device

    @property
    def decoded(self) -> bool:
        """Whether the donor keeps other bytes than the weight's."""
        return bool(self.code)


# What a decoded weight can be.
DECODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Terms:
    """Low-rank patches of one weight: strength * up @ down on rows from `first_row` on.

    `ups` [rows, rank], `downs` [rank, columns]: float32, contiguous, on the host.
    """

    ups: list[torch.Tensor] = field(default_factory=list)
    downs: list[torch.Tensor] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)

    def add(self, up: torch.Tensor, down: torch.Tensor, strength: float, first_row: int) -> None:
        """One more, after those that are there."""
        self.ups.append(up)
        self.downs.append(down)
        self.strengths.append(strength)
        self.first_rows.append(first_row)

    def __len__(self) -> int:
        return len(self.ups)


def code_of(dtype: torch.dtype) -> str:
    """The name of the rows of a tensor that is stored as it is."""
    return str(dtype).removeprefix("torch.")


def block_elements(code: str) -> int:
    """Elements of a block that rows stored as `code` are made of; 1 for plain numbers."""
    return cast(int, _ops.block_elements(code))


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """[rows, columns] of a weight: its first dimension and all others; one row if it has one."""
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def can_decode(device: torch.device) -> bool:
    """Whether this device has the kernel that decodes and patches."""
    if device.type == "cuda":
        return bool(_native.has_cuda_kernels())
    return device.type == "meta" or bool(_native.decode_kernel(device.type))


def _check_can_decode(tensor: torch.Tensor, name: str) -> None:
    if not can_decode(tensor.device):
        raise PlacementError(
            f"weight {name!r} is stored quantised, scaled or with patches, and distorch has no "
            f"kernels for {tensor.device}: for CUDA, build it where nvcc is (DISTORCH_CUDA=1 says "
            "why it is not built); or load with dtype= and lora_mode='merge', and GGUF on 'cpu'"
        )


def decode(
    into: torch.Tensor,
    stored: torch.Tensor,
    code: str,
    *,
    scales: torch.Tensor | None = None,
    block: Sequence[int] = (1, 1),
    table: torch.Tensor | None = None,
    rotation: int = 0,
    terms: Terms | None = None,
    finite: torch.Tensor | None = None,
) -> None:
    """into [rows, columns] = round_once(turned_back(float32(stored)) * scales + terms), on into's
    device. (W4x16 and W6x16 get their scales before they are turned back.)

    `stored` has rows as `code` says, in whatever dtype; `scales` float32 [grid rows, grid columns],
    one for `block` (rows, columns) elements; `table` float32 [n], numbers that all blocks of some
    codes share; `rotation`: columns that ConvRot turned together, 0 for none. `finite` (bool [1])
    turns false when a product is not.
    """
    terms, device = terms or Terms(), into.device
    ups, downs = ([f.to(device) for f in factors] for factors in (terms.ups, terms.downs))
    scales, table = (part.to(device) if part is not None else None for part in (scales, table))
    _ops.decode_(
        into, stored, code, scales, list(block), ups, downs, terms.strengths, terms.first_rows,
        finite, table, rotation,
    )  # fmt: skip


def decoded(
    stored: torch.Tensor,
    code: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    *,
    scales: torch.Tensor | None = None,
    block: Sequence[int] = (1, 1),
    table: torch.Tensor | None = None,
    rotation: int = 0,
    name: str,
) -> torch.Tensor:
    """A sharded tensor `dtype` [sizes] whose fetch decodes the bytes of `stored` (sharded), as
    `decode` does.
    """
    _check_can_decode(stored, name)
    made = _ops.decoded(
        stored, code, dtype, list(sizes), scales, list(block), name, table, rotation
    )
    return cast(torch.Tensor, made)


def decoded_like(stored: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bytes of `stored` (sharded) decoded as those of `like` are; its geometry."""
    return cast(torch.Tensor, _ops.decoded_like(stored, like))


def patched(weight: torch.Tensor, terms: Terms) -> torch.Tensor:
    """A sharded tensor on the donor of `weight`, patched by these terms when it is fetched."""
    _check_can_decode(weight, state(weight).name)
    made = _ops.patched(weight, terms.ups, terms.downs, terms.strengths, terms.first_rows)
    return cast(torch.Tensor, made)


def set_patches(weight: torch.Tensor, terms: Terms) -> None:
    """Other patches for a weight that is decoded; operators see the old ones or the new."""
    _ops.set_patches(weight, terms.ups, terms.downs, terms.strengths, terms.first_rows)


def moves(weight: torch.Tensor) -> int:
    """Changes with every write to a sharded weight, and every other source that it gets: for
    `adopt`."""
    return cast(int, _ops.moves(weight))


def adopt(weight: torch.Tensor, same: torch.Tensor, moves: int) -> bool:
    """Makes `weight` of what `same` (sharded) is made of, which has the same bits, while operators
    run. False if `weight` was written to or patched anew since `moves(weight)` gave `moves`.
    """
    return cast(bool, _ops.adopt(weight, same, moves))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes live on a donor."""
    return cast(bool, _ops.is_sharded(tensor))


def state(tensor: torch.Tensor) -> WeightState:
    """What the engine knows of a sharded tensor (ValueError on a plain one)."""
    return WeightState(*_ops.weight_info(tensor))


def byte_view(tensor: torch.Tensor, begin: int = 0, nbytes: int | None = None) -> torch.Tensor:
    """Bytes [begin, begin + nbytes) of a plain tensor's storage: uint8, 1-D, no copy."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() - begin if nbytes is None else nbytes
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(storage, begin, (count,), (1,))


def shard_host(data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    """A sharded tensor whose donor is the storage of `data` (host memory), not a copy."""
    return cast(torch.Tensor, _ops.shard_host(data, compute, name))


def shard_scratch(data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    """A sharded tensor whose donor, in the scratch file, has the bytes of `data`'s storage."""
    return cast(torch.Tensor, _ops.shard_scratch(data, compute, name))


def shard_file(
    path: str,
    offset: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    compute: torch.device,
    name: str,
) -> torch.Tensor:
    """A contiguous sharded tensor that is read from a file, `offset` bytes from its start."""
    return cast(torch.Tensor, _ops.shard_file(path, offset, sizes, dtype, compute, name))


def pinned_memory(nbytes: int, compute: torch.device) -> torch.Tensor:
    """Pinned host memory of exactly that size for copies to a device: uint8 [nbytes]."""
    return cast(torch.Tensor, _ops.pinned_slab(nbytes, compute))


def shard_slab(
    slab: torch.Tensor, begin: int, like: torch.Tensor, compute: torch.device, name: str
) -> torch.Tensor:
    """A sharded tensor with the geometry of `like` over bytes of pinned memory, from `begin` on."""
    return cast(torch.Tensor, _ops.shard_slab(slab, begin, like, compute, name))


def shard_device(data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    """A sharded tensor whose donor is the storage of `data` (device memory), not a copy."""
    return cast(torch.Tensor, _ops.shard_device(data, compute, name))


def shard_striped(
    parts: Sequence[torch.Tensor], like: torch.Tensor, compute: torch.device, name: str
) -> torch.Tensor:
    """One weight whose bytes are those of several sharded tensors, one after the other."""
    return cast(torch.Tensor, _ops.shard_striped(list(parts), like, compute, name))


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """`tensor.data = data`, also between devices where PyTorch refuses.

    Operators of other threads must not run on `tensor` meanwhile: see `runtime.changes`.
    """
    _native.set_data(tensor, data)


def share(tensor: torch.Tensor) -> torch.Tensor:
    """A second sharded tensor made of what the first is made of now. Both write to one donor."""
    return cast(torch.Tensor, _ops.share(tensor))


def file_range(tensor: torch.Tensor) -> tuple[str, int] | None:
    """(path, byte offset) of a weight that is read from a checkpoint, else None."""
    path, offset = _ops.file_range(tensor)
    return (path, offset) if path else None


def donor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The donor's bytes, uint8 [nbytes], without a copy: writing to them is up to you."""
    return cast(torch.Tensor, _ops.donor_bytes(tensor))


def read_file(path: str, offset: int, into: torch.Tensor) -> None:
    """Fills a contiguous CPU tensor from a file, past the page cache. FormatError, FetchError."""
    _ops.read_file(path, offset, into)


def host_tensor(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new plain CPU tensor, not filled, in large pages where it is large."""
    return cast(torch.Tensor, _ops.host_tensor(list(sizes), dtype))


def empty_beside(tensor: torch.Tensor, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new plain tensor, not filled, on the device of `tensor`."""
    if tensor.device.type == "cpu":
        return host_tensor(sizes, dtype)
    return torch.empty(tuple(sizes), dtype=dtype, device=tensor.device)


def read_tensor(path: str, offset: int, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new CPU tensor with its bytes from a file, past the page cache. FormatError, FetchError."""
    return cast(torch.Tensor, _ops.read_tensor(path, offset, list(sizes), dtype))


def read_donor(tensor: torch.Tensor, begin: int, into: torch.Tensor) -> None:
    """Fills a contiguous CPU tensor with the donor's bytes from byte `begin` on. FetchError."""
    _ops.read_donor(tensor, begin, into)


def dequantise(blocks: torch.Tensor, block_type: str, dtype: torch.dtype) -> torch.Tensor:
    """GGUF blocks, uint8 [.., bytes], as numbers [.., elements] of float32, float16 or bfloat16.

    Computed in float32 with the bits of `gguf.quants.dequantize`, rounded once.
    """
    return cast(torch.Tensor, _ops.dequantise(blocks, block_type, dtype))


def dequantise_into(into: torch.Tensor, blocks: torch.Tensor, block_type: str) -> None:
    """The same into a contiguous tensor [.., elements]."""
    _ops.dequantise_(into, blocks, block_type)


def interleave(into: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Fills uint8 [rows, blocks * bytes] with blocks: of each its bytes of every part, one part
    after the other. `parts` are uint8 [rows, blocks * own bytes], of the first one byte per block.
    """
    _ops.interleave_(into, list(parts))


def suggest_order(sharded: Sequence[torch.Tensor]) -> None:
    """The order in which these weights are likely to be used, before any pass was seen."""
    _ops.suggest_order(list(sharded))


def count_in(tensor: torch.Tensor, group: int) -> None:
    """Counts the fetches of this weight in the counters of that id from now on."""
    _ops.count_in(tensor, group)


def show_address(tensor: torch.Tensor, shown: bool) -> None:
    """Whether reading a sharded tensor's address gives 0 instead of an error."""
    _ops.show_address(tensor, shown)


# (weight, site) -> the real tensor, as a node of a compiled graph: runtime/compiled.py
fetch_in_graph = _ops.fetch.default
