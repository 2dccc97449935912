# SPDX-License-Identifier: Apache-2.0
"""The host's model patcher for models whose weights live on donors.

Note [The host's contract]
The host asks a patcher how large a model is on its device, loads, shrinks and unloads it, and puts
patches on its weights. An instance of our subclass answers for one model; classes and functions of
the host stay as they are. What is true of the weights is kept on the inner model (`Placed`), which
clones share; what a clone wants is its own (`placement`, an attachment).

Note [Rest]
When the host takes a model off its device, weights in RAM and on disk stay where they are, those on
accelerators come to RAM, the ring is given back, and patches are taken off.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

import distorch
from distorch.comfy import host, live, weights
from distorch.comfy.placement import Placement
from distorch.display.tables import human_bytes
from distorch.errors import PlacementError
from distorch.planner import Plan
from distorch.runtime import distribution, planning
from distorch.runtime.groups import can_leave_device, group_members, size_of, unique_buffers
from distorch.runtime.options import Options
from distorch.runtime.ring_room import ring_bytes
from distorch.runtime.staging import current_place

KEY = "distorch"  # of the attachment, and of wrappers
NODE = "distorch_node"  # of another attachment: the node that placed the model
_STATE = "_distorch_comfy"
_log = logging.getLogger("distorch")


@dataclass
class Placed:
    """What is true of an inner model: the placement it was given (None: at rest, or shrunk since),
    the patches that are on its weights, and how long it sampled.
    """

    placement: Placement | None = None
    budget: int | None = None  # bytes for "auto", as the host gave them
    applied: dict[str, Any] = field(default_factory=dict)
    sampling_seconds: float = 0.0  # since the last report


_placed_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _distributions() -> dict[nn.Module, distribution.Distribution]:
    """Of all inner models of ours that are there, loaded or not."""
    known = {model: distribution.known_distribution(model) for model in _placed_models}
    return {model: state for model, state in known.items() if state is not None}


def placed(model: nn.Module) -> Placed:
    """The record of an inner model, made on first use."""
    _placed_models.add(model)
    return model.__dict__.setdefault(_STATE, Placed())


def is_ours(patcher: Any) -> bool:
    """Whether this patcher keeps a placement."""
    return isinstance(patcher, DistorchPatcher)


class DistorchPatcher(ModelPatcher):
    """A ModelPatcher whose model is placed by `placement`; see the notes above."""

    @property
    def placement(self) -> Placement:
        """What this clone wants, on the device that it computes on."""
        wanted: Placement = self.attachments[KEY]
        return wanted.on(device_name(self.load_device))

    # --- the bar on the node, see Note [The bar on a node] ---

    @property
    def node(self) -> live.Node | None:
        """The node that placed this clone."""
        found: live.Node | None = self.attachments.get(NODE)
        return found

    def show(self, note: str, *, ok: bool = True) -> None:
        """Where the weights are, with a sentence, on the node."""
        compute = device_name(self.load_device)
        live.show(self.node, lambda: live.Bar(self.held(), compute, note, ok=ok))

    # --- sizes, as the host counts: bytes on the load device ---

    def is_dynamic(self) -> bool:
        """No: dynamic VRAM would move weights by itself. See Note [Two ways into the host]."""
        return False

    # What was on the host's list of loaded models when it asked for this model's size. It asks
    # before it loads the first of several models. Those that join the list afterwards belong to the
    # same sampling, and must stay.
    listed_before: host.Listed = ()

    def model_size(self) -> int:
        """Bytes that the load device will hold, the ring included."""
        self.listed_before = host.listed()
        if KEY not in getattr(self, "attachments", ()):  # some hosts ask while a clone is made
            return int(super().model_size())
        return self._wanted_size()

    def _wanted_size(self) -> int:
        plan, ring = self._planned()
        return int(plan.bytes[plan.compute] + ring)

    def loaded_size(self) -> int:
        """Bytes that the load device holds now, measured, the ring included."""
        return int(self.model.model_loaded_weight_memory)

    def lowvram_patch_counter(self) -> int:
        """No patch is put on at run time."""
        return 0

    def _planned(self) -> tuple[Plan, int]:
        state, wanted = placed(self.model), self.placement
        if distribution.is_distributed(self.model) and state.placement == wanted:
            now = distribution.distribution_of(self.model)
            return now.plan, now.ring_bytes
        plan, options = self.plan(state.budget)
        ring = ring_bytes(group_members(self.model), plan, options)
        return plan, ring

    def plan(self, budget: int | None) -> tuple[Plan, Options]:
        """Where the weights would go, as if the host had freed what it can. PlacementError.

        `budget` is how many bytes "auto" gets, None if the host has not said yet.
        """
        spec, given = self._request(budget)
        _refuse_unplaceable(self.model, spec, self.placement.compute)
        groups, options = group_members(self.model), Options(**given)
        keep = host.joined_since(self.listed_before)
        devices = host.with_freed(planning.devices_for(groups, self.model), self.model, keep)
        inventory = distribution.inventory_now(self.model, groups)
        return planning.plan_inventory(inventory, spec, options, devices), options

    def _request(self, budget: int | None) -> tuple[str, dict[str, Any]]:
        wanted = self.placement
        spec = wanted.spec
        if spec == "auto" and budget is not None and wanted.compute != "cpu":
            spec = f"{wanted.compute},{budget}b;cpu,*"
        total = sum(group.nbytes for group in group_members(self.model))
        return spec, wanted.options(total)

    # --- loading ---

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Places the model as asked and patches what changed; bytes more on the load device."""
        before = self.loaded_size()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            try:
                self._take_objects_back()
                self.load(device_to, before + extra_memory, force_patch_weights)
                self.patch_model(load_weights=False)
                self._bring_strays()
            except Exception:
                self.detach()
                raise
        return self.loaded_size() - before

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """The weights to their places, then patches on those where they changed."""
        with self.use_ejected():
            self.unpatch_hooks()
            self._place(None if full_load else lowvram_model_memory)
            if self._patch():
                self._place_again()
            self._set_modules(loaded=True)
            self.model.device = self.load_device
            self.model.current_weight_patches_uuid = self.patches_uuid
            self._measure()
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def _place(self, memory: float | None) -> None:
        state, wanted = placed(self.model), self.placement
        if wanted.spec == "auto":
            state.budget = None if memory is None or memory > 1e15 else max(0, int(memory))
        if distribution.is_distributed(self.model) and state.placement == wanted:
            return
        plan, _ = self.plan(state.budget)
        spec, options = self._request(state.budget)
        management.soft_empty_cache()
        self._make_room(plan)
        total = sum(group.nbytes for group in group_members(self.model))
        try:
            distorch.distribute(self.model, spec, progress=progress_bar(total), **options)
        except (torch.OutOfMemoryError, PlacementError) as error:
            raise advice(error, wanted) from error
        state.placement = wanted

    def held(self) -> dict[str, int]:
        """Bytes of weights on each device, without the ring."""
        if not distribution.is_distributed(self.model):
            return {}
        return _by_device(distribution.distribution_of(self.model).plan)

    def _make_room(self, plan: Plan) -> None:
        """On donors. The host makes room on the device that computes."""
        now, keep = self.held(), host.joined_since(self.listed_before)
        for place, nbytes in _by_device(plan).items():
            missing = nbytes - now.get(place, 0)
            if place == "cpu" and plan.compute != "cpu":
                self._make_room_for_pins(missing)
            elif place not in ("cpu", "disk", plan.compute) and missing > 0:
                # A tenth more, as the host does: memory has holes.
                host.make_room(int(missing * 1.1), torch.device(place), keep)

    def _make_room_for_pins(self, nbytes: int) -> None:
        pinned = sum(
            _by_device(state.plan).get("cpu", 0)
            for state in _distributions().values()
            if state.plan.compute != "cpu"
        )
        if not host.make_room_for_pins(nbytes, pinned):
            _log.warning(
                "%s pins %s of RAM, more than ComfyUI has left for pinned memory; give less to cpu "
                "and more to disk if the machine runs out of memory",
                type(self.model).__name__, human_bytes(nbytes),
            )  # fmt: skip

    def _place_again(self) -> None:
        """Patched weights of 4 or 8 bits are wider now: the placement holds for what they are."""
        state = distribution.distribution_of(self.model)
        budget = placed(self.model).budget
        spec, options = self._request(budget)
        if self.plan(budget)[0].placement != state.plan.placement:
            distorch.distribute(self.model, spec, progress=False, **options)

    def _patch(self) -> bool:
        """Whether sizes changed."""
        before = distribution.distribution_of(self.model).plan.total_bytes
        full = self.placement.lora_precision == "full"
        total = sum(
            size_of(comfy.utils.get_attr(self.model, key))
            for key, found in self.patches.items()
            if found
        )
        weights.repatch(
            self.model, self.patches, self.backup, placed(self.model).applied,
            offload=self.offload_device, full=full, progress=progress_bar(total),
        )  # fmt: skip
        return distribution.distribution_of(self.model).plan.total_bytes != before

    def _measure(self) -> None:
        report = distorch.report(self.model)
        ring = distribution.distribution_of(self.model).ring_bytes
        self.model.model_loaded_weight_memory = report.bytes[report.compute] + ring
        self.model.model_offload_buffer_memory = ring
        self.model.model_lowvram = False
        problem = next(iter(report.problems), None)
        self.show(problem or f"ring {human_bytes(ring)}", ok=problem is None)
        where = ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in report.bytes.items())
        _log.info("%s: %s, ring %.1f MiB", type(self.model).__name__, where, ring / 2**20)

    def _set_modules(self, *, loaded: bool) -> None:
        """Flags and weight wrappers that the host's own layers look at."""
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            if hasattr(module, "prev_comfy_cast_weights"):
                module.comfy_cast_weights = module.prev_comfy_cast_weights
                del module.prev_comfy_cast_weights
            module.weight_function = list(self.weight_wrapper_patches.get(f"{name}.weight", ()))
            module.bias_function = list(self.weight_wrapper_patches.get(f"{name}.bias", ()))
            module.comfy_force_cast_weights = self.force_cast_weights and loaded
            if not loaded:
                module.weight_function, module.bias_function = [], []
                module.__dict__.pop("comfy_patched_weights", None)
                continue
            module.comfy_patched_weights = True
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True

    def _bring_strays(self) -> None:
        """What object patches brought along computes where the rest does."""
        for buffer in unique_buffers(self.model):
            if buffer.tensor.device != self.load_device:
                buffer.put(buffer.tensor.to(self.load_device))

    # --- unloading ---

    def partially_unload(
        self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Moves resident weights to RAM until so many bytes are free; how many bytes that were."""
        if self.load_device.type == "cpu" or not distribution.is_distributed(self.model):
            return 0
        before, ring = self._resident_size(), self._own_ring()
        with self.use_ejected():
            self.unpatch_hooks()
            if memory_to_free > ring:
                smaller = demoted(self.model, int(memory_to_free) - ring)
                distorch.redistribute(self.model, plan=smaller, progress=False)
            distribution.distribution_of(self.model).reserve(0)  # the next load makes a ring anew
            placed(self.model).placement = None
            self._measure()
        return before - self._resident_size() + ring

    def _resident_size(self) -> int:
        return self.loaded_size() - int(self.model.model_offload_buffer_memory)

    def _own_ring(self) -> int:
        """Bytes that come free when this model needs no ring. The models on a device share one. It
        is as large as the largest of them needs.
        """
        others = [
            state.ring_bytes
            for model, state in _distributions().items()
            if model is not self.model and state.plan.compute == device_name(self.load_device)
        ]
        own = distribution.distribution_of(self.model).ring_bytes
        return max(0, own - max(others, default=0))

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Takes patches off, and the model off its device when `device_to` names another."""
        self.eject_model()
        if unpatch_weights:
            self.unpatch_hooks()
            self._set_modules(loaded=False)
            if distribution.is_distributed(self.model):
                weights.restore_all(self.model, self.backup, placed(self.model).applied)
                if device_to is not None:
                    self._rest()
                    self.model.device = device_to
            self.model.current_weight_patches_uuid = None
            self.model.model_loaded_weight_memory = 0
            self.model.model_offload_buffer_memory = 0
        self._take_objects_back()

    def _take_objects_back(self) -> None:
        super().unpatch_model(None, unpatch_weights=False)

    def _rest(self) -> None:
        """See Note [Rest]."""
        state = distribution.distribution_of(self.model)
        if state.plan.compute == "cpu":
            return
        distorch.redistribute(self.model, plan=demoted(self.model, None), progress=False)
        state = distribution.distribution_of(self.model)
        state.reserve(0)
        buffers = unique_buffers(self.model)
        for buffer in buffers:
            buffer.put(buffer.tensor.to("cpu"))
        names = {buffer.name: "cpu" for buffer in buffers}
        state.plan = replace(state.plan, placement={**state.plan.placement, **names})
        placed(self.model).placement = None
        self.show("not loaded: its weights are at rest")


def device_name(device: torch.device) -> str:
    """ "cuda:0"."""
    return device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def _by_device(plan: Plan) -> dict[str, int]:
    """Bytes of a plan on each device. The parts of a stripe count as equally large."""
    found: dict[str, int] = {}
    for place, nbytes in plan.bytes.items():
        devices = place.split("+")
        for device in devices:
            found[device] = found.get(device, 0) - (-nbytes // len(devices))
    return found


def demoted(model: nn.Module, nbytes: int | None) -> Plan:
    """The present plan with resident weights in RAM: the largest ones until they are `nbytes`.

    None: every weight that is on any accelerator.
    """
    plan = distribution.distribution_of(model).plan
    moves: dict[str, str] = {}
    left = nbytes if nbytes is not None else None
    for group in sorted(group_members(model), key=lambda group: -group.nbytes):
        place = current_place(group.first)
        if not can_leave_device(group.first) or place in ("cpu", "disk"):
            continue
        if left is not None and (left <= 0 or place != plan.compute):
            continue
        moves.update((member.name, "cpu") for member in group.members)
        left = left - group.nbytes if left is not None else None
    return replace(plan, placement={**plan.placement, **moves})


def _refuse_unplaceable(model: nn.Module, spec: str, compute: str) -> None:
    """Weights that are not memory, nor made of such, can only stay; say so when they are most."""
    groups = group_members(model)
    fixed = [group for group in groups if not can_leave_device(group.first)]
    total = sum(group.nbytes for group in groups)
    if fixed and 2 * sum(group.nbytes for group in fixed) > total:
        kind = type(fixed[0].first.data).__name__
        raise PlacementError(
            f"{len(fixed)} weights of this model ({fixed[0].name!r} is the first) are {kind}, "
            f"which cannot leave {compute}, so {spec!r} cannot be honoured; use the same model "
            "as bf16, fp16, fp8 or GGUF"
        )


def progress_bar(total: int) -> Callable[[int], None]:
    """Reports bytes done to the host's bar on the node."""
    bar = comfy.utils.ProgressBar(max(total, 1))
    return bar.update


def advice(error: Exception, wanted: Placement) -> Exception:
    """The error with what to change; the host shows it on the node."""
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    full = _full_device(str(error), wanted)
    smaller = f"a smaller share for {full}"
    if full == wanted.compute:
        smaller += " (or more virtual VRAM), a smaller prefetch, or a smaller image or batch"
    return PlacementError(
        f"{full} ran out of memory with placement {wanted.spec!r}. Give it less: {smaller}. "
        f"({str(error).splitlines()[0]})"
    )


def _full_device(message: str, wanted: Placement) -> str:
    """The device that an error of PyTorch names ("GPU 1", "device 1", "sim:1"), else the one that
    computes.
    """
    kind = wanted.compute.partition(":")[0]
    found = re.search(rf"(?:GPU |[Dd]evice |{kind}:)(\d+)", message)
    return f"{kind}:{found[1]}" if found and kind != "cpu" else wanted.compute
