# SPDX-License-Identifier: Apache-2.0
"""A patcher: one of many views of a model, with patches of its own."""

import contextlib
import uuid

import torch

import comfy.lora
import comfy.utils


def string_to_seed(text):
    return sum(text.encode())


def get_key_weight(model, key):
    path, _, name = key.rpartition(".")
    owner = comfy.utils.get_attr(model, path)
    functions = (getattr(owner, f"{kind}_{name}", None) for kind in ("set", "convert"))
    return getattr(owner, name), *functions


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.size = model, size
        self.load_device, self.offload_device = load_device, offload_device
        self.patches, self.backup = {}, {}
        self.object_patches, self.object_patches_backup = {}, {}
        self.weight_wrapper_patches, self.attachments = {}, {}
        self.callbacks, self.wrappers, self.injections = {}, {}, {}
        self.additional_models, self.clone_base_uuid = {}, uuid.uuid4()
        self.model_options = {"transformer_options": {}}
        self.force_cast_weights = False
        self.patches_uuid, self.parent = uuid.uuid4(), None
        self.forced_hooks = self.current_hooks = None
        self.cached_patcher_init = None
        for name, value in (
            ("device", offload_device), ("model_loaded_weight_memory", 0),
            ("current_weight_patches_uuid", None), ("model_offload_buffer_memory", 0),
            ("model_lowvram", False),
        ):  # fmt: skip
            if not hasattr(model, name):
                setattr(model, name, value)

    def is_dynamic(self):
        return False

    def model_size(self):
        return sum(t.nbytes for t in self.model.state_dict().values())

    def loaded_size(self):
        return self.model.model_loaded_weight_memory

    def current_loaded_device(self):
        return self.model.device

    def clone(self, disable_dynamic=False, model_override=None):
        kind = ModelPatcher if disable_dynamic and self.is_dynamic() else self.__class__
        if kind is not self.__class__ and model_override is None:
            make, arguments = self.cached_patcher_init
            made = make(*arguments, disable_dynamic=True)
            model_override = made.model, (made.backup, made.object_patches_backup)
        model, shared = model_override or (self.model, (self.backup, self.object_patches_backup))
        other = kind(model, self.load_device, self.offload_device, self.model_size())
        other.patches = {key: list(found) for key, found in self.patches.items()}
        other.patches_uuid, other.parent = self.patches_uuid, self
        other.backup, other.object_patches_backup = shared[0], shared[-1]
        other.object_patches = dict(self.object_patches)
        other.model_options = {
            name: dict(found) if isinstance(found, dict) else found
            for name, found in self.model_options.items()
        }
        other.weight_wrapper_patches = dict(self.weight_wrapper_patches)
        other.attachments = dict(self.attachments)
        other.wrappers = {kind: dict(found) for kind, found in self.wrappers.items()}
        other.callbacks, other.injections = dict(self.callbacks), dict(self.injections)
        other.additional_models = dict(self.additional_models)
        other.clone_base_uuid = self.clone_base_uuid
        other.force_cast_weights = self.force_cast_weights
        other.cached_patcher_init = self.cached_patcher_init
        return other

    def is_clone(self, other):
        return self.model is other.model

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = self.model.state_dict()
        for key, adapter in patches.items():
            if key in known:
                entry = (strength_patch, adapter, strength_model, None, None)
                self.patches[key] = [*self.patches.get(key, []), entry]
        self.patches_uuid = uuid.uuid4()
        return list(patches)

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_all_callbacks(self, kind):
        return self.callbacks.get(kind, [])

    @contextlib.contextmanager
    def use_ejected(self, skip_and_inject_on_exit_only=False):
        yield

    def eject_model(self):
        pass

    def unpatch_hooks(self):
        self.current_hooks = None

    def apply_hooks(self, hooks, force_apply=False):
        self.current_hooks = hooks

    def patch_model(self, device_to=None, lowvram_model_memory=0, load_weights=True):
        for key, value in self.object_patches.items():
            before = comfy.utils.set_attr(self.model, key, value)
            self.object_patches_backup.setdefault(key, before)
        if load_weights:
            self.load(device_to)
        return self.model

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for key, kept in self.backup.items():
                comfy.utils.set_attr(self.model, key, torch.nn.Parameter(kept.weight, False))
            self.backup.clear()
            if device_to is not None:
                self.model.to(device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
        for key, before in self.object_patches_backup.items():
            comfy.utils.set_attr(self.model, key, before)
        self.object_patches_backup.clear()

    def load(self, device_to=None, **_):
        self.model.to(device_to)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.patch_model(device_to)
        return self.loaded_size()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.unpatch_model(self.offload_device)
        return self.model

    def __del__(self):
        self.detach(unpatch_all=False)


class ModelPatcherDynamic(ModelPatcher):
    """What dynamic VRAM loads: weights as in the file, and those that no file has without memory."""

    def __new__(cls, model, load_device, *_):
        if load_device.type == "cpu" and cls.cpu_is_static:
            return ModelPatcher(model, load_device, *_)
        return super().__new__(cls)

    cpu_is_static = False  # the tests have no other device for some

    def is_dynamic(self):
        return True

    def unpatch_hooks(self):
        raise RuntimeError("hooks are not implemented here")


class OnlyDynamic(ModelPatcherDynamic):
    """Of a host without a static path."""

    def clone(self, model_override=None):
        return super().clone(model_override=model_override)


CoreModelPatcher = ModelPatcher
