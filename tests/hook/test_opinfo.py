"""PyTorch's own operator database: every operator, with sharded arguments, in every mode.

Each sample runs plain and with its tensors sharded; values, gradients, in-place results and error
types must agree.
"""

import warnings

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map

import distorch

SAMPLES = 4
# Results that are not a function of the arguments.
RANDOM = {
    "bernoulli", "dropout", "empty", "empty_like", "empty_permuted", "empty_strided", "exponential",
    "geometric", "log_normal", "multinomial", "new_empty", "new_empty_strided", "normal", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "rrelu", "uniform", "cauchy",
}  # fmt: skip
# Composite kernels that read memory themselves, before any operator is called: the error says so.
READS_MEMORY = {"nn.functional.ctc_loss", "nn.functional.max_pool1d", "sparse.mm", "tensor_split"}
# Plain against plain, with the same values at other addresses: the last bits of these differ now
# and then (LAPACK's blocking depends on alignment), so that ours can only be as close as those.
UNSTEADY = {"linalg.lstsq"}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
OPS = sorted({op.formatted_name + op.variant_test_name: op for op in op_db}.items())


def shardable(value):
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_complex()
        and value.numel() > 0
        and value.untyped_storage().nbytes() > 0
    )


def sharded_copy(value):
    copy = distorch.shard(value.detach().clone(), "cpu" if value.numel() % 2 else "disk")
    return copy.requires_grad_(value.requires_grad)


def plain_copy(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def outcome(op, args):
    """Outputs, or the error."""
    torch.manual_seed(0)
    try:
        return op(args[0], *args[1], **args[2])
    except Exception as error:
        return error


def assert_equal(got, wanted, what, tolerances):
    if isinstance(wanted, Exception):
        assert type(got) is type(wanted), (what, got)
        return
    assert not isinstance(got, Exception), (what, got)
    flat_got, flat_wanted = tree_flatten(got)[0], tree_flatten(wanted)[0]
    assert len(flat_got) == len(flat_wanted), what
    for a, b in zip(flat_got, flat_wanted, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b or (a != a and b != b), what  # noqa: PLR0124
            continue
        assert a.shape == b.shape, what
        assert a.dtype == b.dtype, what
        if a.layout is torch.strided:
            assert a.stride() == b.stride() or a.numel() < 2 or distorch.is_sharded(a), what
        values = a.detach().clone() if distorch.is_sharded(a) else a.detach()
        torch.testing.assert_close(values, b.detach(), equal_nan=True, **tolerances)


def gradients(result, inputs):
    outs = [
        t for t in tree_flatten(result)[0]
        if isinstance(t, torch.Tensor) and t.requires_grad and t.is_floating_point()
    ]  # fmt: skip
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outs or not wanted:
        return []
    try:
        return torch.autograd.grad([o.sum() for o in outs], wanted, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return error


def check(op, function, sample, mode, grad):
    structure = (sample.input, sample.args, sample.kwargs)
    plain = tree_map(plain_copy, structure)
    sharded = tree_map(lambda v: sharded_copy(v) if shardable(v) else plain_copy(v), structure)
    flat_plain, flat_sharded = tree_flatten(plain)[0], tree_flatten(sharded)[0]
    with mode():
        wanted, got = outcome(function, plain), outcome(function, sharded)
    if op.name.split(".")[-1] in RANDOM:
        return
    if op.name in READS_MEMORY and isinstance(got, RuntimeError):
        assert "distorch.materialize" in str(got)
        return
    exact = {"rtol": 0, "atol": 0}
    tolerances = {} if op.name in UNSTEADY else exact
    assert_equal(got, wanted, "result", tolerances)
    assert_equal(flat_sharded, flat_plain, "arguments afterwards", exact)
    if grad and not isinstance(wanted, Exception):
        wanted, got = gradients(wanted, flat_plain), gradients(got, flat_sharded)
        assert_equal(got, wanted, "gradients", tolerances)


@pytest.mark.parametrize("name", [name for name, _ in OPS])
def test_operator(name):
    op = dict(OPS)[name]
    dtype = torch.float32 if torch.float32 in op.supported_dtypes("cpu") else torch.int64
    if dtype not in op.supported_dtypes("cpu"):
        pytest.skip("not for float32 or int64")
    functions = {"": op.op}
    if op.inplace_variant is not None:
        functions["_"] = op.inplace_variant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode, context in MODES.items():
            grad = mode == "grad" and op.supports_autograd and dtype.is_floating_point
            samples = op.sample_inputs("cpu", dtype, requires_grad=grad)
            for _, sample in zip(range(SAMPLES), samples, strict=False):
                for function in functions.values():
                    check(op, function, sample, context, grad)
