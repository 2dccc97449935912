# SPDX-License-Identifier: Apache-2.0
"""Modules without weights, to be loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Modules that this thread makes inside have parameters without memory, on the meta device.

    Example::

        with distorch.init_empty_weights():
            model = MyTransformer(config)
        distorch.load(model, "weights.safetensors", "cuda:0,2gb;cpu,*")

    Buffers are real, unlike with `torch.device("meta")`: a module's own `__init__` fills them, and
    a checkpoint often lacks them. Parameters that are no plain `nn.Parameter` (lazy ones, those of
    quantised layers) stay as they are.
    """
    if hasattr(_here, "known"):  # inside of another one
        yield
        return
    _here.known = WeakIdKeyDictionary()
    try:
        yield
    finally:
        del _here.known


# .known: parameters that were registered inside of a block of this thread, and what has taken their
# places. A parameter that is registered twice is tied, and must stay one.
_here = threading.local()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    known = getattr(_here, "known", None)
    if known is None or type(parameter) is not nn.Parameter or parameter.is_meta:
        return None
    if parameter not in known:
        empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        empty.__dict__.update(parameter.__dict__)
        known[parameter] = empty
    return known[parameter]  # type: ignore[no-any-return]


# Once, and for good: PyTorch walks its hooks for every parameter of every thread, and raises an
# error if one comes or goes meanwhile.
register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
