# SPDX-License-Identifier: Apache-2.0
"""Estimates a step from shapes: nothing is computed, on a machine that need not be at hand.

A dispatch mode runs every operator on the meta device instead, where tensors have shapes and no
values. Its time comes from its arithmetic and its bytes (Rates.operator_seconds).

A weight with values is exchanged for a meta tensor of its form when a function of PyTorch gets it,
so that autograd sees one device. No gradient reaches the weight itself.

Models also compute small things from numbers that they know, such as positions. As long as no
weight takes part, such tensors are computed as they are, so that a model may look at them.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from distorch import _ops
from distorch.errors import PlacementError
from distorch.machine import machine as this_machine
from distorch.machine.calibration import figures_of
from distorch.machine.links import measured_links
from distorch.machine.profiles import Machine, machine_of
from distorch.machine.rates import Rates
from distorch.machine.supposed import supposing
from distorch.prediction.keeping import kept
from distorch.prediction.operators import Names, append, is_no_work, needs_values, use_of
from distorch.prediction.work import (
    all_tensors,
    bytes_in,
    bytes_of,
    flops_of,
    is_half,
    written_by,
)
from distorch.runtime.distribution import known_distribution, no_changes
from distorch.runtime.groups import form_of, group_members, has_bytes
from distorch.runtime.options import check_module, compute_device
from distorch.step import Step, Use

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# What autocast computes in the shorter dtype.
_AUTOCAST = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv",
    "aten::addmv", "aten::convolution", "aten::linear", "aten::matmul",
})  # fmt: skip
# They give numbers to Python. Without this, each has an error of its own.
_SHOWS_NUMBERS = frozenset({
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__format__,
    torch.Tensor.__array__, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
    torch.Tensor.__index__,
})  # fmt: skip
_ASKED_FOR_NUMBERS = re.compile(
    r"on meta tensors|meta device type tensor|unallocated storage|with Meta tensors"
)
_BACKWARD_PASSES: dict[Any, tuple[str, ...]] = {
    torch.Tensor.backward: (
        "tensors", "grad_tensors", "retain_graph", "create_graph", "inputs"
    ),
    torch.autograd.backward: (
        "tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs"
    ),
}  # fmt: skip
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_BACKWARD = 2.5  # times the arithmetic of attention: five products of matrices in place of two
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Functions that PyTorch makes of several operators, and that a GPU does in one or a few.
_PARTS = frozenset({
    functional.rms_norm, torch.rms_norm, functional.multi_head_attention_forward,
})  # fmt: skip
_SMALL = 1 << 16  # elements: up to so many, what no weight takes part in is computed as it is


@contextmanager
def estimate_step(
    module: nn.Module,
    machine: Machine | str | os.PathLike[str] | None = None,
    *,
    compute: str | None = None,
) -> Iterator[Step]:
    """Estimates the step that runs inside of the `with` block. Nothing is computed.

    Example::

        with torch.device("meta"):
            model = Net()  # no memory
        with distorch.estimate_step(model, "rtx3090-pcie4x16-64gb") as step:
            model(torch.empty(1, 4096, 64, device="meta"))
        machine = "rtx3090-pcie4x16-64gb"
        print(distorch.predict(model, step, "cuda:0,4gb;cpu,*", machine=machine))

    The module may be on any device, also on "meta", and distributed or not. So may the inputs. The
    outputs have shapes and no values, and the module is as before. Each operator takes as long as
    its arithmetic at the speed of the device, or as its bytes in the memory: whichever is longer.
    A recorded step (`record_step`) is more exact where the model and the machine are at hand.

    Args:
        module: Any module whose weights have shapes.
        machine: Which machine computes: a `Machine`, its name, or the path of its file. If not
            given: this one, as `calibrate` measured it.
        compute: Which of its devices computes. If not given: the first GPU, or on this machine what
            computes the module now.

    Returns:
        A context manager that gives a `Step`.

    Raises:
        SpecError: There is no such machine.
        FormatError: The file of the machine is damaged.
        PlacementError: This machine was not measured, the step needs numbers that were not
            computed, or the block changes a module or steps an optimizer.
    """
    check_module(module)
    there = machine_of(machine)
    state = known_distribution(module)
    plan = state.plan if state is not None else None

    def is_unchanged() -> bool:
        now = known_distribution(module)
        return now is state and (now is None or now.plan is plan)

    with supposing(there):
        if compute is not None:
            device = compute_device(compute)
        elif plan is not None and there is None:
            device = plan.compute
        else:
            device = this_machine.default_compute(())
        measured = measured_links()
        rates = Rates(device, measured)
        rates.operator_seconds(0.0, 0, is_half=False)  # says so if they are not known
    speed = measured.speed(device)
    assert speed is not None
    step = Step(device, machine="" if there is None else there.name, speed=figures_of(speed))
    estimator = _Estimator(Names(module), rates)
    # Else a mode imports it when it is called first, and notes the operators that this runs.
    import_module("torch._dynamo")
    try:
        with kept(module, is_unchanged), _nothing_else(), estimator, _Functions(estimator):
            yield step
    finally:
        if estimator.has_refused_compiled:  # what it compiled fails in later calls, too
            torch._dynamo.reset()
    if not is_unchanged():
        raise PlacementError(
            "the module was placed anew while its step was estimated; estimate a step alone"
        )
    step.uses += estimator.uses
    used = set(step.weights)
    for group in group_members(module):
        if group.name in used:
            step.forms[group.name] = form_of(group.first)


@contextmanager
def _nothing_else() -> Iterator[None]:
    """In the block, this thread changes no module, and no optimizer takes a step: both would keep
    tensors without values.
    """
    own = threading.get_ident()

    def refuse(*_: object) -> None:
        if threading.get_ident() == own:
            raise PlacementError(
                "estimate_step: an optimizer would keep tensors without values; leave its step out"
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        with no_changes("no module can be changed in the block of distorch.estimate_step"):
            yield
    finally:
        hook.remove()


class _Estimator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator on the meta device, and notes what it would take."""

    supports_higher_order_operators = True  # they are refused by name

    def __init__(self, names: Names, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: list[Use] = []
        self.autocast: torch.dtype | None = None  # of the function that runs now
        self._names = names
        self._rates = rates
        self._in_one: float | None = None  # arithmetic of the parts of one operator, while they run
        self._in_place_of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> both
        self._made: dict[int, StorageWeakRef] = {}  # storages with values that the step has made
        self._stale: dict[int, StorageWeakRef] = {}  # storages that were to be written to
        # Of the function that runs now: storages of meta tensors, and what they stand for.
        self.stand_for: dict[int, torch.Tensor] = {}
        self._has_cast = False  # autocast was at work
        self.has_refused_compiled = False  # an operator that PyTorch compiles when it is called

    def note(self, use: Use, flops: float, nbytes: int, *, is_half: bool) -> None:
        """One operator."""
        if self._in_one is not None:
            self._in_one += flops
            return
        seconds = self._rates.operator_seconds(flops, nbytes, is_half=is_half)
        append(self.uses, use._replace(seconds=seconds))

    def note_parts(
        self, given: list[torch.Tensor], made: list[torch.Tensor], flops: float = 0.0
    ) -> None:
        """One operator that PyTorch makes of several."""
        weights = dict.fromkeys(name for tensor in given for name in self._names.of(tensor))
        nbytes = bytes_in([*given, *made])
        self.note(Use(0.0, 1, tuple(weights)), flops, nbytes, is_half=is_half(given[0]))

    def as_one(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """Runs operators that are parts of one: what they give, and their arithmetic."""
        before, self._in_one = self._in_one, 0.0
        try:
            return run(), self._in_one
        finally:
            self._in_one = before

    def stand_in(self, value: Any) -> Any:
        """A meta tensor in place of a weight or of what wants a gradient; else the value itself."""
        if not isinstance(value, torch.Tensor) or value.is_meta or not has_bytes(value):
            return value
        if not (value.requires_grad or any(self._names.of(value))):
            return value
        if id(value) not in self._in_place_of:
            twin = meta_like(value).requires_grad_(value.requires_grad)
            self._names.also(twin, value)
            self._in_place_of[id(value)] = value, twin
        return self._in_place_of[id(value)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # it calls operators on its parts, which come here
        if not isinstance(func, OpOverload):  # torch.cond, flex_attention
            self.has_refused_compiled = True
            raise _cannot_run(func)
        return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = all_tensors(args, kwargs)
        with_values = not any(tensor.is_meta or self.is_stale(tensor) for tensor in given)
        if given and func.is_view and not any(tensor.is_meta for tensor in given):
            if func._schema.name == "aten::lift_fresh":  # torch.tensor(...) has just made it
                self._note_made(given[0])
            return func(*args, **kwargs)
        use = use_of(self._names, func, args, kwargs)
        known = with_values and not use.weights and self._may_be_computed(func, args, given)
        if _looks_at_numbers(func, given):
            if known:
                return self._computed(func, args, kwargs)
            raise _no_numbers(str(func))
        originals: dict[int, torch.Tensor] = {}
        shapes, named = tree_map(lambda value: _without_values(value, originals), (args, kwargs))
        if func._schema.name in _AUTOCAST and self.autocast is not None:
            shapes, named = tree_map(self._cast, (shapes, named))
            self._has_cast = True
        elif func._schema.name in _AUTOCAST and not self._has_cast:
            _check_dtypes(func, all_tensors(shapes, named))
        if not given and "device" in _arguments(func):
            named["device"] = torch.device("meta")
        if self._brings(func, args, kwargs):
            use = use._replace(copied=args[0].nbytes)
        result, flops = self._run(func, shapes, named)
        if not is_no_work(func):
            nbytes, is_half = bytes_of(func, shapes, named, result)
            self.note(use, flops, nbytes, is_half=is_half)
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if known and sum(tensor.numel() for tensor in made) <= _SMALL:
            return self._computed(func, args, kwargs)
        self._note_stale(written_by(func, args, kwargs))
        # An operator that writes gives the tensor that it was given.
        return tree_map(lambda value: originals.get(id(value), value), result)

    def _brings(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it copies a tensor from RAM to the device that computes."""
        target = kwargs.get("device")
        if func._schema.name != "aten::_to_copy" or target is None or args[0].device.type != "cpu":
            return False
        return self._rates.compute != "cpu" and target.type == self._rates.compute.split(":")[0]

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return torch.empty_like(value, dtype=self.autocast) if floating else value

    def _may_be_computed(
        self, func: OpOverload, args: tuple[Any, ...], given: list[torch.Tensor]
    ) -> bool:
        """Whether it is small, of no chance, and writes to nothing that was there before."""
        if sum(tensor.numel() for tensor in given) > _SMALL:
            return False
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(_ops.is_sharded, given)):
            return False
        return not func._schema.is_mutable or all(map(self._has_made, all_tensors(args[:1], {})))

    def _has_made(self, tensor: torch.Tensor) -> bool:
        return _knows(self._made, tensor)

    def is_stale(self, tensor: torch.Tensor) -> bool:
        """Whether something was written to it that has no values."""
        return bool(self._stale) and has_bytes(tensor) and _knows(self._stale, tensor)

    def _computed(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:  # such as that of a weight
            kwargs = kwargs | {"device": torch.device("cpu")}
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note_made(value)
        return result

    def _note_stale(self, written: list[torch.Tensor]) -> None:
        """Tensors with values that were not written to, as they would be in a real step."""
        for tensor in written:
            if not has_bytes(tensor):
                continue
            original = self.stand_for.get(tensor.untyped_storage()._cdata, tensor)
            if not original.is_meta:
                storage = original.untyped_storage()
                self._stale[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _note_made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._stale.pop(storage._cdata, None)

    def _run(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, float]:
        """What an operator gives, and its arithmetic."""
        try:
            formula = flop_registry.get(func.overloadpacket)
            if formula is None and func.has_kernel_for_dispatch_key(_COMPOSITE):
                with self:  # in inference mode, such as aten::linear are not taken apart before
                    return self.as_one(lambda: func.decompose(*args, **kwargs))
            result = func(*args, **kwargs)
            if formula is None:
                return result, flops_of(func, args)
            # A product of complex numbers is four of real ones.
            times = 4 if any(tensor.is_complex() for tensor in all_tensors(args, {})) else 1
            return result, float(times * formula(*args, **kwargs, out_val=result))
        except NotImplementedError as error:
            raise _cannot_run(func) from error


def _knows(storages: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    found = storages.get(tensor.untyped_storage()._cdata)
    return found is not None and not found.expired()  # type: ignore[no-untyped-call]


class _Functions(TorchFunctionMode):
    """Exchanges weights. Takes for one operator what a GPU does in one, or in a few: attention,
    which keeps no matrix of scores, and what _PARTS names.
    """

    def __init__(self, estimator: _Estimator) -> None:
        super().__init__()
        self._estimator = estimator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(self._estimator.stand_in, (args, kwargs or {}))
        originals: dict[int, torch.Tensor] = {}
        given = all_tensors(args, kwargs)
        if func in _SHOWS_NUMBERS and any(t.is_meta or self._estimator.is_stale(t) for t in given):
            raise _no_numbers(getattr(func, "__name__", str(func)))
        stand_for = dict(self._estimator.stand_for)
        if any(tensor.is_meta for tensor in given):
            # PyTorch wants all of them in one place.
            args, kwargs = tree_map(lambda value: _without_values(value, originals), (args, kwargs))
            for tensor in all_tensors(args, kwargs):
                if id(tensor) in originals:
                    stand_for[tensor.untyped_storage()._cdata] = originals[id(tensor)]
        estimator = self._estimator
        before = estimator.autocast, estimator.stand_for
        estimator.autocast, estimator.stand_for = _autocast_dtype(), stand_for
        try:
            result = self._called(func, args, kwargs)
        except (RuntimeError, TypeError) as error:
            if _ASKED_FOR_NUMBERS.search(str(error)):
                raise _no_numbers(getattr(func, "__name__", str(func))) from error
            raise
        finally:
            estimator.autocast, estimator.stand_for = before
        return tree_map(lambda value: originals.get(id(value), value), result)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attention(dict(zip(_ATTENTION, args, strict=False)) | kwargs)
        if func in _PARTS:
            made, flops = self._estimator.as_one(lambda: func(*args, **kwargs))
            self._estimator.note_parts(all_tensors(args, kwargs), all_tensors(made, {}), flops)
            return made
        if func in _BACKWARD_PASSES:
            named = dict(zip(_BACKWARD_PASSES[func], args, strict=False)) | kwargs
            if "gradient" in named:  # as Tensor.backward has it
                named["grad_tensors"] = named.pop("gradient")
            with self:  # what is computed again in it comes here, too
                return _run_backward(**named)
        if func == _SET_DATA and not args[0].is_meta:
            return None
        return func(*args, **kwargs)

    def _attention(self, given: dict[str, Any]) -> torch.Tensor:
        for name in "query", "key", "value":
            if self._estimator.autocast is not None:
                given[name] = given[name].to(self._estimator.autocast)
        wanted = [given.get(name) for name in ("query", "key", "value", "attn_mask")]
        out: torch.Tensor
        out, _ = self._estimator.as_one(lambda: functional.scaled_dot_product_attention(**given))
        flops, shape = _attention_flops(given, out), out.shape
        if torch.is_grad_enabled() and out.requires_grad:
            out = _Attention.apply(self._estimator, flops, shape, *wanted)  # type: ignore[no-untyped-call]
        self._estimator.note_parts(all_tensors(tuple(wanted), {}), [out], flops)
        return out


def _run_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    **_: Any,
) -> None:
    """As torch.autograd.backward, which would call the function mode once more."""
    roots = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    if grad_tensors is None and any(root.numel() != 1 for root in roots):
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    whole = grad_tensors is None or isinstance(grad_tensors, torch.Tensor)
    given = (grad_tensors,) if whole else tuple(grad_tensors)
    gradients = tuple(
        torch.ones_like(root) if gradient is None else gradient
        for root, gradient in itertools.zip_longest(roots, given)
    )
    wanted = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs or ())
    torch.autograd.Variable._execution_engine.run_backward(
        roots,
        gradients,
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        wanted,
        allow_unreachable=True,
        accumulate_grad=True,
    )


class _Attention(torch.autograd.Function):
    """Attention whose backward pass is one operator, too: it computes the scores anew."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        estimator: _Estimator,
        flops: float,
        shape: torch.Size,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The shape of the result."""
        ctx.estimator, ctx.flops = estimator, flops
        ctx.save_for_backward(query, key, value)
        ctx.mask = mask
        return query.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The shapes of the gradients."""
        given = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in given]
        estimator: _Estimator = ctx.estimator
        estimator.note_parts([*grads, *given], made, _BACKWARD * ctx.flops)
        mask = ctx.mask
        wants = mask is not None and mask.requires_grad
        return None, None, None, *made, torch.empty_like(mask) if wants else None


def _attention_flops(given: dict[str, Any], out: torch.Tensor) -> float:
    """Of the scores, and of the sums that they weigh."""
    query, key, value = given["query"], given["key"], given["value"]
    pairs = out.shape[:-1].numel() * key.shape[-2]
    if given.get("is_causal"):
        pairs //= 2
    return float(2 * pairs * (query.shape[-1] + value.shape[-1]))


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that form without values."""
    with torch._C._DisableTorchDispatch():  # this is no operator of the step
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _without_values(value: Any, originals: dict[int, torch.Tensor]) -> Any:
    """A tensor as a meta tensor, whose original is noted; a device as the meta device."""
    if isinstance(value, torch.Tensor) and not value.is_meta and has_bytes(value):
        twin = meta_like(value)
        originals[id(twin)] = value
        return twin
    return torch.device("meta") if isinstance(value, torch.device) else value


def _autocast_dtype() -> torch.dtype | None:
    """What autocast would make of matrices. It does not know the meta device."""
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None


def _cannot_run(func: object) -> PlacementError:
    return PlacementError(
        f"estimate_step: {func} cannot be run on shapes alone; record the step with "
        "distorch.record_step"
    )


def _check_dtypes(func: OpOverload, given: list[torch.Tensor]) -> None:
    """On the meta device, products of matrices take what no other device takes."""
    dtypes = {tensor.dtype for tensor in given if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise PlacementError(
            f"estimate_step: {func} gets numbers of {' and '.join(sorted(map(str, dtypes)))}, "
            "which a real step refuses; give inputs of the weights' dtype"
        )


def _no_numbers(what: str) -> PlacementError:
    return PlacementError(
        f"estimate_step: the step needs numbers that were not computed ({what}); record it with "
        "distorch.record_step, or give the module a size in their place"
    )


def _arguments(func: OpOverload) -> set[str]:
    return {argument.name for argument in func._schema.arguments}


def _looks_at_numbers(func: OpOverload, given: list[torch.Tensor]) -> bool:
    """Whether the result depends on numbers, in its shape or as a number of Python's."""
    if not needs_values(func):
        return False
    masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    return func._schema.name != "aten::index" or masks
