# SPDX-License-Identifier: Apache-2.0
"""The options of `distribute` and `load`: types, defaults, and what is refused at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from distorch.errors import SpecError
from distorch.planner import MIN_BYTES, ORDERS, Plan, parse_bytes, parse_spec
from distorch.step import Step


class OptionsOfStep(TypedDict, total=False):
    """The options of a placement for a step that is given otherwise."""

    compute: str | torch.device | None
    order: Literal["interleaved", "sequential", "optimal"]
    min_bytes: int | str
    keep: str | Sequence[str]
    offload: str | Sequence[str]
    rules: Sequence[tuple[str, str]]
    prefetch: int | str
    compress: Literal["auto", "never"]


class PlacementOptions(OptionsOfStep, total=False):
    """The options of `distribute`, as documented there. `Options` has their defaults."""

    step: Step | None


@dataclass
class Options:
    """The options of `distribute`, checked: bytes are numbers or "auto", patterns are sequences."""

    compute: str | torch.device | None = None
    order: str = "interleaved"
    step: Step | None = None
    min_bytes: int | str = MIN_BYTES
    keep: str | Sequence[str] = ()
    offload: str | Sequence[str] = ()
    rules: Sequence[tuple[str, str]] = ()
    prefetch: int | str = "auto"
    compress: str = "auto"

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        others: Iterable[str] = (),
        before: Options | None = None,
    ) -> Options:
        """Options by name; those that are not given are as they were `before`.

        SpecError names the nearest one where there is none of a name. `others` are the function's
        own arguments, which may have been meant, too.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise SpecError(f"there is no option {name}=; {_hint(name, [*known, *others])}")
        return replace(before or cls(), **options)

    def as_planned(self, plan: Plan, given: Iterable[str] = ()) -> Options:
        """These options, but for those with which the plan was made.

        SpecError if an option that was `given` by name is another one there.
        """
        made = {key: value for key, value in plan.options.items() if key in _PLANNED}
        if self.min_bytes == "auto":  # the plan has the number that this was for its share
            made.pop("min_bytes", None)
        planned = replace(self, order=plan.order, compute=plan.compute, **made)
        for name in given:
            mine, its = getattr(self, name), getattr(planned, name)
            if name == "compute" and mine is not None:
                mine = compute_device(mine)
            if name in _PLANNED and mine is not None and _as_json(mine) != _as_json(its):
                raise SpecError(
                    f"{name}={mine!r}: the plan that is given was made with {its!r}; make a new "
                    f"one with distorch.plan(..., {name}={mine!r})"
                )
        return planned

    def __post_init__(self) -> None:
        self.keep = (self.keep,) if isinstance(self.keep, str) else self.keep
        self.offload = (self.offload,) if isinstance(self.offload, str) else self.offload
        self._check_choices()
        self.prefetch = _bytes_or_auto(self.prefetch, "prefetch")
        self.min_bytes = _bytes_or_auto(self.min_bytes, "min_bytes")
        for name, patterns in (("keep", self.keep), ("offload", self.offload)):
            if not _all_strings(patterns):
                raise SpecError(
                    f"{name}={patterns!r}: expected name patterns, such as ['blocks.0.*']"
                )
            setattr(self, name, tuple(patterns))  # the caller's list is the caller's
        if not _is_sequence(self.rules) or not all(_is_rule(rule) for rule in self.rules):
            raise SpecError(
                f"rules={self.rules!r}: expected (pattern, device) pairs, such as "
                "[('blocks.0.*', 'cpu')]"
            )
        self.rules = tuple(self.rules)
        if self.compute is not None:
            compute_device(self.compute)

    def _check_choices(self) -> None:
        if self.compress not in ("auto", "never"):
            raise SpecError(
                f"compress={self.compress!r}: this version sends weights as they are; "
                "expected 'auto' or 'never'"
            )
        if self.order not in ORDERS:
            raise SpecError(
                f"order={self.order!r}: expected 'interleaved', 'sequential' or 'optimal'"
            )
        if self.step is not None and not isinstance(self.step, Step):
            raise SpecError(
                f"step=: expected a step, from `with distorch.record_step(model) as step:` or from "
                f"distorch.Step.load(path), got {type(self.step).__name__}"
            )


# Options of other libraries: what is asked for with them here, by the option that does it.
_ELSEWHERE = {
    "torch_dtype": ("dtype", "here it is called dtype="),
    "device_map": ("spec", "a placement says where weights go, such as 'cuda:0,6gb;cpu,*'"),
    "max_memory": ("spec", "a placement says what a device may hold, such as 'cuda:0,6gb;cpu,*'"),
    "offload_folder": ("spec", "DISTORCH_DISK in the environment is the folder for such files"),
    "low_cpu_mem_usage": ("dtype", "leave it out: weights are always streamed"),
    "quantization_config": ("dtype", "weights are used as the file has them; give a narrow file"),
    "attn_implementation": ("trust_remote_code", "call model.set_attn_implementation() afterwards"),
    "local_files_only": ("revision", "set HF_HUB_OFFLINE=1, which forbids downloads"),
    "safety_checker": ("components", "give components={'safety_checker': None}"),
    "scheduler": ("components", "give components={'scheduler': ...}"),
}


def _hint(name: str, known: Sequence[str]) -> str:
    """What may have been meant by the name of an option that there is not."""
    option, what = _ELSEWHERE.get(name, ("", ""))
    if option in known:
        return what
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}=?" if close else f"there are {', '.join(dict.fromkeys(known))}"


# What a plan has decided.
_PLANNED = ("compute", "order", "min_bytes", "keep", "offload", "rules")


def check_one_placement(
    spec: str | None,
    plan: Plan | None,
    virtual_vram: str | int | None,
    donor: str | None,
) -> None:
    """Raises SpecError unless exactly one argument says where weights go."""
    if isinstance(spec, Plan):
        raise SpecError("a Plan is given as plan=, and the placement is left out")
    if plan is not None and not isinstance(plan, Plan):
        raise SpecError(
            f"plan={plan!r}: expected a Plan; Plan.load('p.json') reads a saved one, and a "
            "placement string is given without plan="
        )
    if virtual_vram is not None:
        _bytes_or_auto(virtual_vram, "virtual_vram", auto=False)
    given = {"a placement": spec, "plan=": plan, "virtual_vram=": virtual_vram}
    said = [name for name, value in given.items() if value is not None]
    if len(said) != 1:
        found = " and ".join(said) or "none of them"
        raise SpecError(
            "give a placement such as 'cuda:0,2.5gb;cpu,*', virtual_vram= or plan=: one of them; "
            f"got {found}"
        )
    if donor is not None and virtual_vram is None:
        raise SpecError(
            f"donor={donor!r} says where the bytes of virtual_vram= go, which is not given; in a "
            f"placement, write '...;{donor},*'"
        )


def check_module(module: object) -> None:
    """Raises SpecError on what is no module."""
    if isinstance(module, nn.Module):
        return
    if isinstance(module, type):
        raise SpecError(f"expected a module, got the class {module.__name__}: make one of it first")
    raise SpecError(
        f"expected a module (torch.nn.Module), got {type(module).__name__}; of a pipeline, give "
        "one of its parts, such as pipe.transformer"
    )


def compute_device(name: object, what: str = "compute") -> str:
    """ "cuda" -> "cuda:0". SpecError when it is no device, or none that computes."""
    if isinstance(name, torch.device) and name.type != "meta":
        return "cpu" if name.type == "cpu" else f"{name.type}:{name.index or 0}"
    text = name if isinstance(name, str) else ""
    try:
        device = parse_spec(f"{text},*").entries[0].device
    except SpecError as error:
        raise SpecError(
            f"{what}={name!r} is not a device that computes; expected 'cpu' or an accelerator, "
            "such as 'cuda:0'"
        ) from error
    if device == "disk" or "+" in device:
        raise SpecError(f"{what}={name!r}: that cannot compute; expected 'cpu' or an accelerator")
    return device


_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16",
    "fp32": "float32", "f32": "float32",
    "float": "float32", "fp64": "float64", "double": "float64",
}  # fmt: skip


def dtype_of(
    value: torch.dtype | str,
    what: str,
    expected: str = "a floating dtype, such as torch.bfloat16 or 'bfloat16'",
) -> torch.dtype:
    """torch.bfloat16 of itself, "bfloat16", "bf16" or "torch.bfloat16". SpecError."""
    found = value
    if isinstance(value, str):
        name = value.strip().lower().removeprefix("torch.")
        found = getattr(torch, _DTYPES.get(name, name), value)
    if not isinstance(found, torch.dtype):
        raise SpecError(f"{what}={value!r}: expected {expected}")
    return found


def _bytes_or_auto(value: int | str, what: str, auto: bool = True) -> int | str:
    if auto and isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        plain = auto and isinstance(value, str) and value.isdecimal()
        return parse_bytes(int(value) if plain else value)
    except SpecError as error:
        raise SpecError(
            f"{what}={value!r}: expected bytes, such as 1048576 or '1mb'" + ", or 'auto'" * auto
        ) from error


def _as_json(value: Any) -> Any:
    """Lists for tuples, at every depth: what JSON makes of them."""
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _all_strings(values: Any) -> bool:
    kinds = isinstance(values, set | frozenset) or _is_sequence(values)
    return kinds and all(isinstance(value, str) for value in values)


def _is_rule(rule: Any) -> bool:
    return _is_sequence(rule) and len(rule) == 2 and _all_strings(rule)
