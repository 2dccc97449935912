# SPDX-License-Identifier: Apache-2.0
"""Asking for the devices of a machine makes no context on GPUs that nothing is placed on."""

import pytest
import torch

import distorch
from distorch.machine import machine


def test_devices_print_as_a_table():
    found = distorch.devices()
    assert isinstance(found, dict)
    assert str(found).splitlines()[0].split() == ["device", "total", "free", "measured"]
    assert "<th>device</th>" in found._repr_html_()
    assert found.to_dict()["cpu"]["total_bytes"] == found["cpu"].total_bytes > 0


class Gpus:
    """Three GPUs of 24 GB. The first has a context; the second, NVML says, holds 4 GB."""

    def __init__(self):
        self.contexts = {0}
        self.nvml = 4 << 30

    def mem_get_info(self, index):
        self.contexts.add(index)
        return 10 << 30, 24 << 30

    def get_device_properties(self, index):
        class Properties:
            total_memory = 24 << 30

        return Properties

    def device_memory_used(self, index):
        if isinstance(self.nvml, Exception):
            raise self.nvml
        return self.nvml


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: found)
    monkeypatch.setattr(
        torch._C, "_cuda_hasPrimaryContext", lambda index: index in found.contexts, raising=False
    )
    return found


def free(devices):
    return [devices[f"cuda:{index}"].free_bytes >> 30 for index in range(3)]


def test_no_context_is_made(gpus):
    assert free(machine.devices()) == [10, 20, 20]
    for refused in (ModuleNotFoundError("pynvml is not installed"), Exception("Not Supported")):
        gpus.nvml = refused
        assert free(machine.devices()) == [10, 24, 24]
    gpus.nvml = 80 << 30  # of the whole GPU, where this one is a slice of it
    assert free(machine.devices()) == [10, 0, 0]
    assert gpus.contexts == {0}


def test_where_something_is_placed_free_memory_is_exact(gpus):
    found = machine.with_exact(machine.devices(), {"cuda:0", "cuda:2", "cpu", "disk"})
    assert free(found) == [10, 20, 10]
    assert gpus.contexts == {0, 2}
