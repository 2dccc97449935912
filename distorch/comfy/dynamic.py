# SPDX-License-Identifier: Apache-2.0
"""Our patcher for a host that has no static path.

Note [Two ways into the host]
A host with dynamic VRAM knows two kinds of patchers. Dynamic ones page their weights in while a
layer runs. Static ones are loaded before sampling, as ours are, so ours is one of those.

A host without a static path takes every model for a dynamic one. It asks such a patcher for more:
a record of its pinned memory, how much RAM it holds, and to give some of it up. It also frees
nothing before it loads a model next to other dynamic ones. `DynamicPatcher` answers these
questions, makes room by itself, and does everything else as its base class does.

Which of the two a model gets is decided where it is taken over (`outputs.as_placed`). The
Distribution Report says which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distorch.comfy import host
from distorch.comfy.patcher import DistorchPatcher


class DynamicPatcher(DistorchPatcher):
    """What the host takes for a dynamic patcher; see the note above."""

    def is_dynamic(self) -> bool:
        """Always: this host has no other kind."""
        return True

    def clone(self, disable_dynamic: bool = False, **options: Any) -> Any:
        """A clone of ours. `disable_dynamic` is ignored: this host has no static patchers."""
        return super().clone(**options)

    def get_non_dynamic_delegate(self) -> DynamicPatcher:
        """What patches weights between steps, as hooked LoRAs do: this patcher can."""
        return self

    # --- the record of pinned memory, one for each device that a model computes on ---

    def register_load_device(self, device: torch.device) -> None:
        """Makes the record. The host looks it up under `load_device`, and writes into it."""
        records = self.model.__dict__.setdefault("dynamic_pins", {})
        records.setdefault(device, {"active": False, "current_prompt": False})

    def set_in_use_by_current_prompt(self, in_use: bool) -> None:
        """Notes what the host says."""
        self.model.dynamic_pins[self.load_device]["current_prompt"] = in_use

    def loaded_ram_size(self) -> int:
        """Bytes of weights in RAM."""
        return self.held().get("cpu", 0)

    def pinned_memory_size(self) -> int:
        """Bytes of RAM that are pinned: all of them, if an accelerator computes."""
        return 0 if self.load_device.type == "cpu" else self.loaded_ram_size()

    def unregister_inactive_pins(self, ram_to_unload: int, subsets: Sequence[str] = ()) -> int:
        """Nothing: weights in RAM were placed there, and are no copy of anything."""
        return 0

    def partially_unload_ram(self, ram_to_unload: int, subsets: Sequence[str] = ()) -> int:
        """Nothing, for the same reason."""
        return 0

    # --- loading ---

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Makes room for what is not on the device yet, then places the model."""
        missing = max(0, self._wanted_size() - self.loaded_size())
        if missing:
            keep = host.joined_since(self.listed_before)
            host.make_room(missing + host.inference_memory(), self.load_device, keep)
        # The host has counted before there was room.
        extra_memory = max(extra_memory, host.free_for_weights(self.load_device))
        return super().partially_load(device_to, extra_memory, force_patch_weights)
