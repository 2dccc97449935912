# SPDX-License-Identifier: Apache-2.0
"""Peak bytes of the tensors that a forward makes, computed on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512  # CUDA's caching allocator gives multiples of it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages on the meta device, from the operator that makes them until the
    last reference goes. The storages of `weights` count nothing, and neither do views.
    """

    def __init__(self, weights: nn.Module | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        if weights is not None:
            for tensor in (*weights.parameters(), *weights.buffers()):
                self._note(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                self._note(storage, -(-storage.nbytes() // _BLOCK) * _BLOCK)
        return out

    def _note(self, storage: Any, nbytes: int) -> None:
        key = id(storage)
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_: object) -> None:
            self.now -= nbytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class FusedAttention(TorchFunctionMode):
    """Attention as a GPU computes it, without a matrix of all scores.

    Without this, the meta device takes the plain formula.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.empty_like(bias, dtype=query.dtype)  # alive while attention runs
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


@torch.no_grad()
def peak_bytes(module: nn.Module, run: Callable[[Any], object]) -> int:
    """Peak bytes of `run(module)`, which makes its own inputs; weights and buffers not counted.

    The module is on the meta device.
    """
    live = LiveBytes(module)
    with torch.device("meta"), FusedAttention(), live:
        result = run(module)
    del result
    return live.peak


def check_tracker() -> None:
    """Cases that can be counted by hand. AssertionError."""
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256))

    def forward(model: Any) -> object:
        return model(torch.empty(64, 1024))

    # float32. The input lives as long as its caller; at most one other result lives beside a new
    # one. In KiB: 256 input + 256 first result + 256 of ReLU.
    assert peak_bytes(layers, forward) == 3 * (256 << 10)

    def views(_: Any) -> object:
        a = torch.empty(1024)  # 4 KiB
        b = a.view(2, 512)[:, :7] + 1  # 56 bytes, in a block of 512
        del a
        return torch.cat([b, b])  # beside b, when a is gone

    assert peak_bytes(layers, views) == 4096 + 512

    def attention(_: Any) -> object:
        q = torch.empty(1, 2, 2048, 64, dtype=torch.bfloat16)  # 512 KiB; all scores: 16 MiB
        return F.scaled_dot_product_attention(q, q, q)

    # Input and result, a float32 per row and head (16 KiB), and less than 2 KiB of random state.
    assert 0 <= peak_bytes(layers, attention) - ((512 + 512 + 16) << 10) < 2048
