# SPDX-License-Identifier: Apache-2.0
"""The operator sweep: PyTorch's own operator database with sharded arguments.

Every sample input of every operator runs plain, then with each of its tensors sharded alone, then
with all of them (in lists and optional arguments, too), also in place where the operator can;
values, gradients, arguments afterwards and errors must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from .compare import assert_same, copies, gradients, outcome, shardable
from .sweep import Case, add_arguments, run_cases

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
# Uninitialised memory: shapes are compared, values are not.
MEMORY_AS_IT_WAS = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)
# Plain against plain, with the same values at other addresses, the last bits of these differ now
# and then (LAPACK's blocking depends on alignment): compared as torch.testing does.
UNSTEADY = frozenset({"linalg.lstsq"})
OPS = {op.formatted_name + op.variant_test_name: op for op in op_db}


@dataclass(frozen=True)
class Run:
    """How one sample is run."""

    op: Any
    function: Any
    mode: str
    grad: bool


def names(dtype: torch.dtype) -> list[str]:
    """The operators that the CPU has for a dtype."""
    return [name for name, op in sorted(OPS.items()) if dtype in op.supported_dtypes("cpu")]


def check(
    name: str, dtype: torch.dtype, samples: int | None = None, without_grad: int | None = None
) -> None:
    """Runs an operator's samples, or the first ones: `samples` of them with gradients, and
    `without_grad` of them in each mode that has none. Raises DifferentError.
    """
    op = OPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in MODES:
            grad = mode == "grad" and op.supports_autograd and dtype.is_floating_point
            inputs = op.sample_inputs("cpu", dtype, requires_grad=grad)
            functions = [op.op] + ([op.inplace_variant] if op.inplace_variant else [])
            wanted = samples if mode == "grad" else without_grad
            for sample, function in itertools.product(itertools.islice(inputs, wanted), functions):
                structure = (sample.input, sample.args, sample.kwargs)
                _check_sample(Run(op, function, mode, grad), structure)


def check_sparse(name: str, samples: int | None = None) -> int:
    """The same in float32 with one argument sparse, where the operator takes one: every other
    tensor sharded alone. How many calls were compared. Raises DifferentError.
    """
    op, compared = OPS[name], 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        inputs = op.sample_inputs("cpu", torch.float32)
        functions = [op.op] + ([op.inplace_variant] if op.inplace_variant else [])
        for sample, function in itertools.product(itertools.islice(inputs, samples), functions):
            run = Run(op, function, "no_grad", grad=False)
            for structure in _with_one_sparse((sample.input, sample.args, sample.kwargs)):
                plain = copies(structure, set())
                if isinstance(
                    outcome(lambda f=function, p=plain: f(p[0], *p[1], **p[2])), Exception
                ):
                    continue
                for position, value in enumerate(tree_flatten(structure)[0]):
                    if shardable(value):
                        _check_choice(run, structure, {position})
                        compared += 1
    return compared


def _with_one_sparse(structure: Any) -> Iterator[Any]:
    """The arguments with one of several tensors sparse, each in turn, in two layouts."""
    leaves, spec = tree_flatten(structure)
    tensors = [i for i, value in enumerate(leaves) if shardable(value)]
    for position in tensors if len(tensors) > 1 else ():
        value = leaves[position].detach()
        if value.dim() != 2 or not value.is_floating_point():
            continue
        for sparse in (value.to_sparse(), value.to_sparse_csr()):
            yield tree_unflatten([*leaves[:position], sparse, *leaves[position + 1 :]], spec)


def _check_sample(run: Run, structure: Any) -> None:
    """One sample: every tensor sharded alone, then all."""
    found = [i for i, value in enumerate(tree_flatten(structure)[0]) if shardable(value)]
    for position in found:
        _check_choice(run, structure, {position})
    if len(found) > 1:
        _check_choice(run, structure, set(found))


def _check_choice(run: Run, structure: Any, sharded: set[int]) -> None:
    plain, ours = copies(structure, set()), copies(structure, sharded)
    with MODES[run.mode]():
        wanted, got = (
            outcome(lambda args=args: run.function(args[0], *args[1], **args[2]))
            for args in (plain, ours)
        )
    how = {
        "values": run.op.name not in MEMORY_AS_IT_WAS,
        "exact": run.op.name not in UNSTEADY,
    }
    flat_plain, flat_ours = tree_flatten(plain)[0], tree_flatten(ours)[0]
    assert_same(got, wanted, "result", **how)
    assert_same(flat_ours, flat_plain, "arguments afterwards")
    if run.grad and not isinstance(wanted, Exception):
        wanted, got = gradients(wanted, flat_plain), gradients(got, flat_ours)
        assert_same(got, wanted, "gradients", **how)


def cases(options: argparse.Namespace) -> list[Case]:
    """Every operator in every dtype that was asked for."""
    dtypes = [d for d in DTYPES if str(d).removeprefix("torch.") in options.dtype]
    chosen = [
        Case(str(dtype).removeprefix("torch."), name, check, (name, dtype, options.samples))
        for dtype in dtypes
        for name in names(dtype)
    ]
    if "sparse" in options.dtype:
        chosen += [
            Case("sparse", name, check_sparse, (name, options.samples))
            for name in names(torch.float32)
        ]
    return [case for case in chosen if fnmatch.fnmatch(case.name, options.only)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, help="at most so many per operator (default: all)")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16", "int64", "sparse"],
        help="default: all three, and float32 beside sparse arguments",
    )  # fmt: skip
    add_arguments(parser)
    options = parser.parse_args()
    return run_cases("operators", cases(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
