# SPDX-License-Identifier: Apache-2.0
"""What a module that owns sharded parameters does differently: save, load, convert.

Note [Agents]
`nn.Module` looks up `_apply` and its hooks on the instance, so one object per owning module is
enough and no class changes. The agent holds its module weakly and follows it through deepcopy and
pickle. A class that writes its state dict by itself calls no hooks; then the agent stands before
that method, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from distorch import _donors, _ops
from distorch._behaviour import replace_data, saved_values
from distorch.errors import PlacementError
from distorch.runtime import compiled, wrapped
from distorch.runtime.wrapped import is_on_donor

_KEY = "_distorch_agent"
# Set in the __dict__ of a module whose state dict gives out decoded weights sharded, as they are:
# for libraries that ask for a state dict when they mean names and shapes.
KEEP_SHARDED = "_distorch_keep_sharded"

# Set while an agent above has already converted the sharded weights of the whole tree.
_converting: ContextVar[bool] = ContextVar("distorch_converting", default=False)


def agent_of(module: nn.Module) -> ModuleAgent | None:
    """The agent of a module, if it owns or owned sharded parameters."""
    found = module.__dict__.get(_KEY)
    return found if isinstance(found, ModuleAgent) else None


def _save_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Puts values where the state dict has sharded tensors; parameters (keep_vars) stay."""
    for key in module._parameters:
        tensor = state_dict.get(prefix + key)
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
            state_dict[prefix + key] = _values(tensor, KEEP_SHARDED in module.__dict__)


def _values(tensor: torch.Tensor, keep_decoded: bool) -> torch.Tensor:
    """What a state dict says of a tensor: values that are read when they are touched."""
    if not is_on_donor(tensor):
        return tensor
    if not _ops.is_sharded(tensor):
        return wrapped.saved(tensor)
    return tensor if keep_decoded and _ops.state(tensor).decoded else saved_values(tensor)


def _load_hook(module: nn.Module, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True): what was sharded is sharded again."""
    agent = agent_of(module)
    if agent is not None:
        agent.restore_placement()


class ModuleAgent:
    """Keeps one module's sharded parameters sharded.

    `tiers` maps a parameter's key in this module to the donor that holds it.
    """

    def __init__(self, module: nn.Module, compute: torch.device, tiers: dict[str, str]) -> None:
        self._module = weakref.ref(module)
        self.compute = compute
        self.tiers = tiers

    @property
    def module(self) -> nn.Module:
        """The module this agent belongs to."""
        found = self._module()
        assert found is not None, "an agent outlived its module"
        return found

    @classmethod
    def install(cls, module: nn.Module, compute: torch.device, tiers: dict[str, str]) -> None:
        """Gives the module an agent, or new orders to the one it has."""
        agent = agent_of(module)
        if agent is not None:
            agent.compute, agent.tiers = compute, tiers
            return
        agent = cls(module, compute, tiers)
        module.__dict__[_KEY] = agent
        module.__dict__["_apply"] = agent
        if type(module).state_dict is not nn.Module.state_dict:  # one of the instance stays
            module.__dict__.setdefault("state_dict", agent.state_dict)
        module.register_state_dict_post_hook(_save_hook)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_load_hook)  # type: ignore[no-untyped-call]

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Makes a plain module again."""
        agent = module.__dict__.pop(_KEY, None)
        if agent is None:
            return
        module.__dict__.pop("_apply", None)
        if getattr(module.__dict__.get("state_dict"), "__self__", None) is agent:
            del module.__dict__["state_dict"]
        for hooks, ours in (
            (module._state_dict_hooks, _save_hook),
            (module._load_state_dict_post_hooks, _load_hook),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]

    @classmethod
    def restorer(cls, module: nn.Module) -> Callable[[], None]:
        """What puts the module's present agent, or its absence, back."""
        agent = agent_of(module)
        if agent is None:
            return partial(cls.remove, module)
        return partial(cls.install, module, agent.compute, agent.tiers)

    def __call__(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        """`module._apply`: conversions go donor by donor, moves to another device are refused.

        All or nothing for sharded weights: the new ones are made first, below this module too.
        """
        module = self.module
        plain = partial(self._convert_the_rest, fn, {} if recurse else {"recurse": False})
        if _converting.get():
            plain()
            return module
        _refuse_other_devices(module, fn)
        converted = _converted(module, fn, recurse)
        before = [(parameter, parameter.data) for parameter, _ in converted]
        token = _converting.set(True)
        try:
            for parameter, value in converted:
                replace_data(parameter, value)
            plain()
        except BaseException:
            for parameter, value in before:
                replace_data(parameter, value)
            raise
        finally:
            _converting.reset(token)
        return module

    def _convert_the_rest(
        self, fn: Callable[[torch.Tensor], torch.Tensor], options: dict[str, bool]
    ) -> None:
        """What the class does with parameters that are not on donors."""
        module = self.module
        away = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and is_on_donor(parameter)
        }
        # The class's own way, with sharded parameters passed over: RNN modules look at them.
        convert = partial(type(module)._apply, module)
        convert(lambda t: t if is_on_donor(t) else fn(t), **options)
        # A class may make parameters anew, which would lose what ours do differently.
        module._parameters.update(away)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the class says, with values where it has sharded tensors."""
        module = self.module
        found: dict[str, Any] = type(module).state_dict(module, *args, **kwargs)
        given = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)) | kwargs
        if given.get("keep_vars"):
            return found
        for key, value in found.items():
            if isinstance(value, torch.Tensor) and key.startswith(given.get("prefix", "")):
                found[key] = _values(value, KEEP_SHARDED in module.__dict__)
        return found

    def restore_placement(self) -> None:
        """Shards again what became plain, on the donor that the plan names."""
        for key, tier in self.tiers.items():
            parameter = self.module._parameters.get(key)
            if parameter is None or is_on_donor(parameter) or parameter.is_meta:
                continue
            if wrapped.is_wrapper(parameter):
                continue  # the next placement takes it apart
            with torch.no_grad():
                replace_data(
                    parameter, _on_donor(parameter, parameter.detach(), tier, self.compute)
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleAgent:
        copied = memo.get(id(self.module))
        assert isinstance(copied, nn.Module), "an agent is copied with its module"
        compiled.watch(copied)
        return ModuleAgent(copied, self.compute, dict(self.tiers))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleAgent, (self.module, self.compute, {})


def _refuse_other_devices(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Before anything moved: a sharded weight has one compute device."""
    for name, parameter in module.named_parameters():
        if not is_on_donor(parameter):
            continue
        probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                target = fn(probe).device
        except (AssertionError, RuntimeError) as error:  # torch's, of a device that is not there
            raise PlacementError(
                f"cannot move {name!r}: {error}. The model is distributed with compute device "
                f"{parameter.device}, and its weights come there by themselves"
            ) from error
        if target.type == parameter.device.type and (target.index or 0) == (
            parameter.device.index or 0
        ):
            return
        if target.type == "meta":
            raise PlacementError(
                f"cannot move {name!r} to the meta device: the model is distributed, and would "
                "lose its values. Call distorch.undistribute(model) first"
            )
        raise PlacementError(
            f"cannot move {name!r} to {target}: the model is distributed with compute device "
            f"{parameter.device}. Use distorch.redistribute(model, spec, compute='{target}'), or "
            f"distorch.undistribute(model, device='{target}') for a plain module there"
        )


def _converted(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Every sharded parameter with what it becomes, on its donor. The module is not changed."""
    found: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for owner in module.modules() if recurse else (module,):
        agent = agent_of(owner)
        for key, parameter in owner._parameters.items():
            if parameter is None or not _ops.is_sharded(parameter) or id(parameter) in found:
                continue
            with torch.no_grad():
                value = fn(parameter)
                if value is parameter:
                    continue
                if agent is not None and not _ops.is_sharded(value):
                    value = _on_donor(parameter, value, agent.tiers.get(key, "cpu"), agent.compute)
            found[id(parameter)] = parameter, value
    return list(found.values())


def _on_donor(
    parameter: nn.Parameter, values: torch.Tensor, tier: str, compute: torch.device
) -> torch.Tensor:
    """New values of a parameter on a donor, in a storage of their own."""
    values = values.resolve_conj().resolve_neg()
    begin = values.storage_offset() == 0
    whole = begin and values.untyped_storage().nbytes() == values.numel() * values.element_size()
    owned = values if whole and values.device.type == "cpu" else values.clone()
    name = _ops.state(parameter).name if _ops.is_sharded(parameter) else "weight"
    return _donors.shard_on(tier, owned, compute, name)
