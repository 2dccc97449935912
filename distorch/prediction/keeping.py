# SPDX-License-Identifier: Apache-2.0
"""A module that is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_DEPTH = 3  # of lists and dicts in each other, such as caches by layer and length


@contextmanager
def kept(module: nn.Module, as_long_as: Callable[[], bool]) -> Iterator[None]:
    """What the block sets on the module, its parts, and their lists and dicts is taken back.

    Models keep things that they compute once, such as positions. Those of an estimate have no
    values, and would be found by the next real step. (What is kept elsewhere stays, as by
    `functools.lru_cache`.) Gradients are as before, too. Nothing is taken back unless `as_long_as`
    then says that nobody else has changed the module.
    """
    noted: list[tuple[Any, Any]] = []
    for part in module.modules():
        _note(vars(part), noted, 0)
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        if as_long_as():
            for container, before in noted:
                _put_back(container, before)
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient


def _note(container: Any, noted: list[tuple[Any, Any]], depth: int) -> None:
    """A container and what it holds now; then those in it."""
    if depth > _DEPTH:
        return
    if isinstance(container, dict):
        noted.append((container, dict(container)))
        held = list(container.values())
    elif isinstance(container, list):
        noted.append((container, list(container)))
        held = container
    else:
        return
    for value in held:
        _note(value, noted, depth + 1)


def _put_back(container: Any, before: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(before) or any(map(_differ, container, before)):
            container[:] = before
        return
    # One by one: another thread may be calling the module, and must not find it empty.
    for key in [key for key in container if key not in before]:
        container.pop(key, None)
    for key, value in before.items():
        if container.get(key, before) is not value:
            container[key] = value


def _differ(now: Any, then: Any) -> bool:
    return now is not then
