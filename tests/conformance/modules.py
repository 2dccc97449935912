# SPDX-License-Identifier: Apache-2.0
"""The module sweep: PyTorch's own module database with every floating parameter sharded.

Each sample of each module runs plain and with its weights on donors, in training and evaluation,
forward and backward; outputs, gradients and buffers must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import warnings
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_map

import distorch

from .compare import DifferentError, assert_same, gradients, outcome, plain_copy
from .sweep import Case, add_arguments, run_cases

MODULES = {info.formatted_name: info for info in module_db}
DTYPES = (torch.float32, torch.float64)
SPEC = "cpu,0b;disk,*"


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that a module is tried in, None when the CPU has it in none of them."""
    supported = MODULES[name].supported_dtypes("cpu")
    return next((dtype for dtype in DTYPES if dtype in supported), None)


def check(name: str, training: bool, samples: int | None = None) -> None:
    """Runs a module's samples. Raises DifferentError."""
    info = MODULES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=dtype_of(name), requires_grad=True, training=training
        )
        for sample in itertools.islice(inputs, samples):
            if sample.forward_input is None:
                continue
            arguments = sample.constructor_input
            plain = info.module_cls(*arguments.args, **arguments.kwargs)
            plain = plain.to(dtype_of(name)).train(training)
            if any(is_lazy(p) for p in plain.parameters()):  # as our error tells users to
                plain(*sample.forward_input.args, **sample.forward_input.kwargs)
            _check_sample(plain, (sample.forward_input.args, sample.forward_input.kwargs))


def _check_sample(plain: torch.nn.Module, structure: Any) -> None:
    ours = distorch.distribute(copy.deepcopy(plain), SPEC, min_bytes=0)
    left = [
        name
        for name, p in ours.named_parameters()
        if p.is_floating_point() and p.numel() and not distorch.is_sharded(p)
    ]
    if left:
        raise DifferentError(f"not sharded: {left}")
    results = []
    for module in (plain, ours):
        args, kwargs = tree_map(plain_copy, structure)
        result = outcome(lambda m=module, a=args, k=kwargs: m(*a, **k))
        inputs = [*tree_flatten((args, kwargs))[0], *module.parameters()]
        found = [] if isinstance(result, Exception) else gradients(result, inputs)
        results.append((result, found, dict(module.named_buffers())))
    for what, wanted, got in zip(("result", "gradients", "buffers"), *results, strict=True):
        assert_same(got, wanted, what)


def cases(options: argparse.Namespace) -> list[Case]:
    """Every module, in training and in evaluation."""
    return [
        Case("train" if training else "eval", name, check, (name, training, options.samples))
        for training in (True, False)
        for name in sorted(MODULES)
        if dtype_of(name) is not None and fnmatch.fnmatch(name, options.only)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, help="at most so many per module (default: all)")
    add_arguments(parser)
    options = parser.parse_args()
    return run_cases("modules", cases(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
