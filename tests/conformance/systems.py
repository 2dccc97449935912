# SPDX-License-Identifier: Apache-2.0
"""What is compared: ways to keep a module's weights elsewhere, behind one small interface."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

import distorch


class System(ABC):
    """Takes the weights of a module away and gives them back."""

    name: str

    @abstractmethod
    def distribute(self, module: nn.Module) -> nn.Module:
        """The module with its weights elsewhere; raises when they are not."""

    @abstractmethod
    def undo(self, module: nn.Module) -> nn.Module:
        """A plain module again."""

    def redistribute(self, module: nn.Module, turn: int) -> nn.Module:
        """Another placement at odd turns, the first one again at even ones."""
        return self.distribute(self.undo(module))


class Resident(System):
    """Nothing is taken away: what the others are compared with."""

    name = "resident"

    def distribute(self, module: nn.Module) -> nn.Module:
        return module

    def undo(self, module: nn.Module) -> nn.Module:
        return module


def _assert_as_planned(module: nn.Module) -> None:
    """A share that buffers alone exceed, as I-BERT's and MiniMax's do, is said, and is no fault."""
    problems = [p for p in distorch.report(module).problems if "must stay there" not in p]
    assert not problems, problems


class Distorch(System):
    """Every floating parameter leaves, by a placement."""

    def __init__(self, name: str, spec: str, other: str) -> None:
        self.name, self.spec, self.other = name, spec, other

    def distribute(self, module: nn.Module) -> nn.Module:
        distorch.distribute(module, self.spec, min_bytes=0)
        _assert_as_planned(module)
        away = [distorch.is_sharded(p) for p in _parameters(module)]
        assert all(away) if self.spec.startswith("cpu,0b") else any(away), "weights stayed"
        return module

    def undo(self, module: nn.Module) -> nn.Module:
        return distorch.undistribute(module)

    def redistribute(self, module: nn.Module, turn: int) -> nn.Module:
        distorch.redistribute(module, self.other if turn % 2 else self.spec, min_bytes=0)
        _assert_as_planned(module)
        return module


class AccelerateDisk(System):
    """accelerate's `disk_offload`."""

    name = "accelerate-disk"

    def distribute(self, module: nn.Module) -> nn.Module:
        from accelerate import disk_offload

        folder = tempfile.mkdtemp(prefix="offload-")
        disk_offload(module, folder, execution_device=torch.device("cpu"), offload_buffers=False)
        assert any(p.is_meta for p in _parameters(module)), "weights stayed"
        return module

    def undo(self, module: nn.Module) -> nn.Module:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(module)
        return module


class DiffusersGroup(System):
    """diffusers' group offloading, module by module, to disk."""

    name = "diffusers-group"

    def distribute(self, module: nn.Module) -> nn.Module:
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        folder = tempfile.mkdtemp(prefix="offload-")
        apply_group_offloading(
            module, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=folder
        )
        for hook in _group_hooks(module):
            _forget_when_offloaded(hook.group)
        return module

    def undo(self, module: nn.Module) -> nn.Module:
        for hook in _group_hooks(module):
            hook.group.onload_()
        for part in module.modules():
            if hasattr(part, "_diffusers_hook"):
                part._diffusers_hook.remove_hook("group_offloading", recurse=False)
        return module


def _group_hooks(module: nn.Module) -> list[Any]:
    registries = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    found = [r.get_hook("group_offloading") for r in registries if r is not None]
    return [hook for hook in found if hook is not None]


def _forget_when_offloaded(group: Any) -> None:
    """Offloaded weights are fresh memory, which may by chance hold the old values: NaN instead."""

    def forget() -> None:
        for tensor in group.tensor_to_key:
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))

    def offload() -> None:
        type(group).offload_(group)
        forget()

    group.offload_ = offload
    forget()


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.is_floating_point() and p.numel()]


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        Distorch("distorch", "cpu,0b;disk,*", "cpu,40%;disk,60%"),
        Distorch("distorch-mixed", "cpu,50%;disk,50%", "cpu,0b;disk,*"),
        AccelerateDisk(),
        DiffusersGroup(),
    )
}
