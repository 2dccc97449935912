# SPDX-License-Identifier: Apache-2.0
"""Devices, and which models are on them."""

import torch

current_loaded_models = []
default = torch.device("cpu")
free = {}  # device -> bytes that the tests say are free
MAX_PINNED_MEMORY = 1 << 30
asked_to_pin = []  # bytes, as models of ours asked for them


class LoadedModel:
    def __init__(self, patcher):
        self.model, self.device = patcher, patcher.load_device
        self.currently_used = True

    def unload(self, wanted):
        if wanted < self.model.loaded_size():
            freed = self.model.partially_unload(self.model.offload_device, wanted)
            if freed >= wanted:
                return False
        self.model.detach()
        return True


def get_torch_device():
    return default


def get_free_memory(device):
    return free.get(device, 1 << 40)


def soft_empty_cache():
    pass


def minimum_inference_memory():
    return 0


def ensure_pin_budget(nbytes):
    asked_to_pin.append(nbytes)
    return True


def ensure_pin_registerable(nbytes):
    return nbytes <= MAX_PINNED_MEMORY


def free_memory(wanted, device, keep_loaded=()):
    """Takes models off the device, the last loaded first, until so much is free."""
    missing = wanted - get_free_memory(device)
    for loaded in list(current_loaded_models):
        if loaded.device != device or missing <= 0 or loaded in keep_loaded:
            continue
        before = loaded.model.loaded_size()
        if loaded.unload(missing):
            current_loaded_models.remove(loaded)
        missing -= before - loaded.model.loaded_size()


def load_models_gpu(patchers):
    """As the host does before sampling: other clones are let go of, sizes are asked, there is room
    made on each device unless all are dynamic, and the last is loaded first.
    """
    patchers = list(reversed(patchers))
    for patcher in patchers:
        for loaded in list(current_loaded_models):
            if loaded.model.is_clone(patcher):
                current_loaded_models.remove(loaded)
                loaded.model.detach(unpatch_all=False)
    needed = {}
    for patcher in patchers:
        missing = patcher.model_size() - patcher.loaded_size()
        needed[patcher.load_device] = needed.get(patcher.load_device, 0) + missing
    for device, nbytes in needed.items():
        if device.type != "cpu" and not all(patcher.is_dynamic() for patcher in patchers):
            free_memory(nbytes, device)
    for patcher in patchers:
        patcher.partially_load(patcher.load_device, 1e32)
        current_loaded_models.insert(0, LoadedModel(patcher))
