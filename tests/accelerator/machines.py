# SPDX-License-Identifier: Apache-2.0
"""What differs between the accelerators that one test runs on."""

import contextlib
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

MB = 1 << 20
# Older PyTorch does not pass on whether a stream is captured. CUDA is asked directly there.
TELLS_CAPTURES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class Machine:
    """A kind of accelerator.

    `width` is that of a square float32 weight that its allocator cuts exactly; `most_workspace`
    what its libraries may keep for themselves, in bytes; `dtype` what models are computed in;
    `setup` the code that a new process begins with.
    """

    type: str
    dtype: torch.dtype
    width: int
    most_workspace: int
    setup: str = ""

    def __init__(self) -> None:
        self.device = torch.device(self.type, 0)
        self.module = torch.get_device_module(self.type)

    @property
    def weight_bytes(self) -> int:
        return 4 * self.width * self.width

    def second(self) -> torch.device:
        """Another device of that kind; skips the test where there is none."""
        if self.module.device_count() < 2:
            pytest.skip("there is only one device")
        return torch.device(self.type, 1)

    def busy(self) -> None:
        """The current stream has work for a while: what is issued next waits for it."""

    def settle(self) -> None:
        """Everything that was let go is gone."""
        gc.collect()
        self.module.synchronize()
        torch.accelerator.empty_cache()

    def allocated(self) -> int:
        self.settle()
        return self.module.memory_allocated(self.device)

    def capturing(self) -> AbstractContextManager[Any]:
        """What this thread issues is captured in a graph, for replay()."""
        raise NotImplementedError

    def replay(self, graph: Any) -> None:
        raise NotImplementedError

    def room(self, nbytes: int) -> AbstractContextManager[None]:
        """Only so many bytes more can be allocated."""
        raise NotImplementedError


class Cuda(Machine):
    type = "cuda"
    dtype = torch.bfloat16
    width = 4096
    most_workspace = 80 * MB  # cuBLAS and cuBLASLt, 32 MiB each on some

    def busy(self) -> None:
        torch.cuda._sleep(50_000_000)  # cycles: about 30 ms

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph

    def replay(self, graph: Any) -> None:
        graph.replay()

    @contextlib.contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        self.settle()
        total = torch.cuda.get_device_properties(self.device).total_memory
        most = torch.cuda.memory_reserved(self.device) + nbytes
        torch.cuda.set_per_process_memory_fraction((most + 0.5) / total, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


class Simulated(Machine):
    type = "sim"
    dtype = (
        torch.float32
    )  # the CPU's layer norm saves other dtypes for bfloat16 than fake tensors say
    width = 128
    most_workspace = 0
    setup = (
        "from distorch.testing import sim\n"
        "slow = {('cpu', 'sim:0'): (1e9, 1e-5), ('sim:0', 'cpu'): (1e9, 1e-5)}\n"
        "sim.configure(devices=2, memory='64mb', links=slow)\n"
    )

    def capturing(self) -> AbstractContextManager[Any]:
        from distorch.testing import sim

        if not TELLS_CAPTURES:
            pytest.skip("PyTorch before 2.13 does not say whether a simulated stream is captured")

        return sim.capturing()

    def replay(self, graph: Any) -> None:
        """It ran when it was captured."""

    @contextlib.contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        from distorch.testing import sim

        self.settle()
        with sim.room(nbytes, str(self.device)):
            yield
