# SPDX-License-Identifier: Apache-2.0
"""Graphs that are being captured, streams that die, and the user's own errors on the device."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

import distorch

from .cudart import Runtime, said
from .lives import _model

# cudaStreamCaptureMode; what forbids the most comes last.
MODES = {"relaxed": 2, "thread_local": 1, "global": 0}


def capture(device: torch.device) -> dict[str, Any]:
    """What a fetch in a capture says; what another thread may do meanwhile, in every mode."""
    model, x = _model(device)
    if device.type == "sim":
        from distorch.testing import sim

        if torch.__version__ < (2, 13):
            return {"a fetch": "not asked: PyTorch tells of captures there since 2.13"}
        with sim.capturing():
            told = said(lambda: model(x))
        return {"a fetch": told, "wrong": _unexpected(told)}
    beside = {
        name: {mode: _beside(make, number) for mode, number in MODES.items()}
        for name, make in _others().items()
    }
    found: dict[str, Any] = {"beside a capture": beside}
    print(json.dumps(found), flush=True)  # what follows may hang
    torch.cuda.synchronize()
    # By PyTorch, as people capture. Last: one that breaks leaves PyTorch in its middle.
    told = said(lambda: _captured(lambda: model(x)))
    torch.cuda.synchronize()
    after = said(lambda: "works" if model(x).isfinite().all().item() else "gives no numbers")
    return {"a fetch": told, "a forward afterwards": after, **found, "wrong": _unexpected(told)}


def _unexpected(told: Any) -> list[str]:
    expected = isinstance(told, str) and "a graph is being captured" in told
    return [] if expected else [f"a fetch in a capture gave {str(told)[:200]!r}"]


def _captured(work: Callable[[], object]) -> str:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    return "captured"


def _others() -> dict[str, Callable[[], Callable[[], object]]]:
    """What a thread of the engine does while another captures; each made anew, before."""
    runtime = Runtime()

    def recorded(
        work: Callable[[torch.cuda.Stream, torch.cuda.Event], object],
    ) -> Callable[[], Any]:
        def make() -> Callable[[], object]:
            stream, event = torch.cuda.Stream(), torch.cuda.Event()
            event.record(stream)
            return lambda: work(stream, event)

        return make

    return {
        "query": recorded(lambda _, event: event.query()),
        "record": recorded(lambda stream, event: event.record(stream)),
        "wait": recorded(lambda stream, event: stream.wait_event(event)),
        "synchronize": recorded(lambda _, event: event.synchronize()),
        "create": recorded(lambda stream, _: torch.cuda.Event().record(stream)),
        "pin": lambda: lambda: runtime.host_free(runtime.host_alloc(1 << 20)),
        "allocate": _allocating,
    }


def _allocating() -> Callable[[], object]:
    torch.cuda.empty_cache()  # so that PyTorch has to ask CUDA for memory
    return lambda: torch.empty(64 << 20, dtype=torch.uint8, device="cuda")


def _beside(make: Callable[[], Callable[[], object]], mode: int) -> dict[str, str]:
    """What the other thread, and the capture, say of it."""
    heard: list[str] = []
    memory = torch.zeros(64, dtype=torch.uint8, device="cuda")
    work = make()
    torch.cuda.synchronize()

    def other() -> None:
        result = said(work)
        heard.append(result if isinstance(result, str) else "works")

    def meanwhile() -> None:
        thread = threading.Thread(target=other, daemon=True)  # it may hang for ever
        thread.start()
        thread.join(1)

    told = said(lambda: Runtime().captured(mode, memory.data_ptr(), meanwhile) or "captured")
    said(torch.cuda.synchronize)
    return {"the thread": heard[0][:160] if heard else "hangs", "the capture": str(told)[:160]}


def external_stream(device: torch.device) -> dict[str, Any]:
    """Somebody else's stream is destroyed after a model ran on it; then fetches, then the end."""
    import ctypes

    model, x = _model(device)
    wanted = model(x).cpu()
    runtime = Runtime()
    address = runtime.stream()
    stream = torch.cuda.ExternalStream(address)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        first = model(x)
    stream.synchronize()
    found: dict[str, Any] = {"on that stream": torch.equal(first.cpu(), wanted)}
    runtime.call("cudaStreamDestroy", ctypes.c_void_p(address))
    found["a forward after its end"] = said(lambda: torch.equal(model(x).cpu(), wanted))
    found["undistribute"] = said(lambda: distorch.undistribute(model, device="cpu") is model)
    found["synchronize"] = said(lambda: torch.cuda.synchronize() is None)
    wrong = [f"{name}: {value}" for name, value in found.items() if value is not True]
    return {**found, "wrong": wrong}


def assertion(device: torch.device) -> dict[str, Any]:
    """The user's own assertion on the device fails; what does a forward say then?"""
    model, x = _model(device)
    numbers = torch.ones(4, device=device)
    own = said(lambda: numbers[torch.tensor([1 << 20], device=device)].cpu())
    return {
        "the user's operator": str(own)[:300],
        "a forward": str(said(lambda: model(x).cpu()))[:500],
        "deleting the model": str(said(lambda: distorch.undistribute(model, device="cpu")))[:500],
    }
