# SPDX-License-Identifier: Apache-2.0
"""Fetches in Inductor's graphs: when they happen again, and what must not be done to them.

Note [Fetches in graphs]
A fetch gives out memory that others read, under the schema of an operator that makes a new tensor:
functionalization knows no custom operators that give views. What follows from that is seen to here:
* Inductor never takes the memory of a fetch for something else (`_fetched`), nor runs a function
  in place on it: fake fetches alias what they are fetched from.
* Code that writes to a weight is refused before it is made functional (`refuse_writes`). Backends
  other than Inductor have no pass there. For them a fetched weight is frozen while the graph is
  made functional (`_frozen`), so that PyTorch refuses the write. backend="eager" does neither: a
  write goes to the ring, and is lost.
* Uses of one weight are told apart, and backward fetches again instead of keeping weights alive
  (`refetch_in_backward`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.ir import FallbackKernel, MultiOutput
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V
from torch.utils.checkpoint import CheckpointPolicy

from distorch import _ops
from distorch.errors import FetchError

# What hands a weight on in another form: computed again with it.
_FORMS = frozenset(
    {"view", "t", "permute", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select"}
    | {"reshape", "_unsafe_view", "alias", "detach", "as_strided", "split", "clone"}
    | {"_to_copy", "convert_element_type", "getitem"}
)
# Methods in place that change what a tensor says of itself, and no value.
_CHANGE_NO_VALUES = frozenset(
    {"requires_grad_", "detach_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_"}
    | {"unsqueeze_", "as_strided_", "rename_"}
)
_WRITING_OPERATORS = frozenset(
    {"setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod"}
)


def _name(node: torch.fx.Node) -> str:
    """The name of what a node calls, without overload."""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "_overloadpacket", node.target)
    return getattr(packet, "__name__", "")


def refetch_in_backward(graph: torch.fx.Graph) -> None:
    """Gives each fetch a number of its own; marks it, and forms of it, to be computed again."""
    again: set[torch.fx.Node] = set()
    sites = 0
    for node in graph.nodes:
        if node.target is _ops.fetch_in_graph:
            node.args = (node.args[0], sites)
            sites += 1
        elif not (
            _name(node) in _FORMS
            and node.all_input_nodes
            and again.issuperset(node.all_input_nodes)
        ):
            continue
        again.add(node)
        _refuse_kernels_that_write(node)
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = 0


def _refuse_kernels_that_write(weight: torch.fx.Node) -> None:
    """Raises FetchError where a Triton kernel of the user's writes to a fetched weight."""
    for user in weight.users:
        if _name(user) == "triton_kernel_wrapper_functional":
            arguments: Any = user.kwargs["kwargs"]
            written: Any = user.kwargs["tensors_to_clone"]
            if any(arguments.get(key) is weight for key in written):
                _refuse(user)


def refuse_writes(graph: torch.fx.Graph) -> None:
    """Raises FetchError on code that writes to a fetched weight: the donor would not see it.

    `graph` is as Dynamo made it, before it becomes functional.
    """
    fetched = {_storage(node) for node in graph.nodes if node.target is _ops.fetch_in_graph}
    for node in graph.nodes if fetched else ():
        if not fetched.isdisjoint(_storage(written) for written in _written_by(node)):
            _refuse(node)


def _refuse(node: torch.fx.Node) -> None:
    raise FetchError(
        f"compiled code writes to a sharded weight ({node.format_node()}): expected code that "
        "reads weights. Leave this function out with torch.compiler.disable, or keep the weight "
        "resident (keep=[...]) before compiling"
    )


def _storage(node: Any) -> object:
    """What two nodes that alias have in common; of anything else, itself."""
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return node
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a tensor that torch.func wraps
        return node


def _written_by(node: torch.fx.Node) -> list[Any]:
    """The arguments that a node writes to."""
    if node.op not in ("call_method", "call_function"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
        return [given.get(a.name) for a, write in zip(arguments, writes, strict=True) if write]
    written = [node.kwargs["out"]] if "out" in node.kwargs else []
    name = _name(node)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _CHANGE_NO_VALUES
    return written + list(node.args[:1] if in_place or name in _WRITING_OPERATORS else ())


class _Pass(CustomGraphPass):
    """One of the passes above, after whatever was there before."""

    def __init__(self, run: Callable[[torch.fx.Graph], None], before: Any) -> None:
        self.run = run
        self.before = before if isinstance(before, (list, tuple)) else [before] if before else []

    def __call__(self, graph: torch.fx.Graph) -> None:
        for theirs in self.before:
            theirs(graph)
        self.run(graph)

    def uuid(self) -> Any:
        theirs = [getattr(p, "uuid", lambda: None)() for p in self.before]
        return None if None in theirs else (get_hash_for_files((__file__,)), *theirs)


def set_passes() -> None:
    """Puts the passes into Inductor's configuration, behind those that are there."""
    for name, run in (
        ("pre_grad_custom_pass", refuse_writes),
        ("joint_custom_pre_pass", refetch_in_backward),
    ):
        known = getattr(config, name)
        if not isinstance(known, _Pass):
            setattr(config, name, _Pass(run, known))


@functools.cache
def _fetched(kind: type) -> type:
    """The class of a fetch's output: of its own lifetime, with memory that is somebody else's.

    Code is generated when lifetimes are known. From then on it says that it aliases what it was
    fetched from, so that its memory is let go of and never taken for another buffer.
    """

    def aliases(self: Any) -> Sequence[str]:
        generating = getattr(V.graph.scheduler, "current_node", None) is not None
        return [self.input_name(0)] if generating else []

    return type("Fetched", (kind,), {"get_inputs_that_alias_output": aliases})


_fallback: Any = fallback_handler(_ops.fetch_in_graph)  # type: ignore[no-untyped-call]


@_ops.fetch_in_graph.py_functionalize_impl
def _frozen(ctx: Any, weight: torch.Tensor, site: int) -> torch.Tensor:
    """A fetched weight that nobody may write to: "cannot mutate tensors with frozen storage".

    The write would go to a copy, and be lost.
    """
    with ctx.redispatch_to_next():
        fetched: torch.Tensor = ctx.wrap_tensors(
            _ops.fetch_in_graph(ctx.unwrap_tensors(weight), site)
        )
    # torch.func.functionalize has wrappers without an inner tensor.
    if isinstance(inner := getattr(fetched, "elem", None), torch.Tensor):
        torch._freeze_functional_tensor(inner)  # type: ignore[attr-defined]
    return fetched


@register_lowering(_ops.fetch_in_graph, type_promotion_kind=None)
def _lower_fetch(weight: Any, site: int) -> Any:
    fetched = _fallback(weight, site)
    output = fetched.data.data
    assert isinstance(output, (MultiOutput, FallbackKernel))
    # Inductor has made and registered the node already, and there is no argument for its class.
    output.__class__ = _fetched(type(output))
    return fetched
