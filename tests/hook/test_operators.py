# SPDX-License-Identifier: Apache-2.0
"""One sharded tensor among the arguments of operators of every kind."""

import pytest
import torch

import distorch
from distorch.errors import FetchError

DONORS = ("cpu", "disk")


@pytest.fixture(params=DONORS)
def pair(request):
    """A plain tensor and a sharded copy of it."""
    plain = torch.randn(16, 12)
    return plain, distorch.shard(plain, request.param)


CASES = {
    "linear": lambda w: torch.nn.functional.linear(torch.ones(3, 12), w),
    "composite": lambda w: torch.nn.functional.silu(w),
    "view_chain": lambda w: w.t()[2:5].unsqueeze(0) * 2,
    "list_argument": lambda w: torch.cat([w, w[:2], torch.zeros(1, 12)]),
    "optional_argument": lambda w: torch.nn.functional.layer_norm(w, (12,), w[0], w[1]),
    "index": lambda w: w[torch.tensor([3, 1])],
    "foreach": lambda w: torch.stack([t.sum() for t in torch._foreach_mul([w, w], 2.0)]),
    "reduction": lambda w: w.sum(0) + w.amax(),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "embedding": lambda w: torch.nn.functional.embedding(torch.tensor([1, 5]), w),
    "sort": lambda w: w.sort().values,
    "to_device": lambda w: w.to("cpu") * 1,
    "to_device_and_dtype": lambda w: w.to("cpu", torch.float64),
    "to_dtype": lambda w: w.to(torch.float64),
    "item": lambda w: torch.tensor(w[3, 4].item()),
    "mask": lambda w: w[w > 0],
    "like": lambda w: torch.zeros_like(w),
    "complex": lambda w: torch.view_as_complex(w.reshape(16, 6, 2)).conj() * 2,
    "linalg": lambda w: torch.linalg.qr(w)[0],
    "fft": lambda w: torch.fft.fft(w),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "pad": lambda w: torch.nn.functional.pad(w, (1, 1)),
    "unbind": lambda w: torch.stack([row * 2 for row in w]),
    "split": lambda w: w.split(4)[1] + 1,
    "where": lambda w: torch.where(w > 0, w, -w),
    "dropout_eval": lambda w: torch.nn.functional.dropout(w, 0.5, False) + 0,
}


MODES = {
    "grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(pair, name, mode):
    plain, sharded = pair
    with MODES[mode]():
        wanted, got = CASES[name](plain), CASES[name](sharded)
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(got, wanted)


def test_views_stay_sharded_and_cost_nothing(pair):
    plain, sharded = pair
    before = distorch.fetch_count()
    views = [sharded.t(), sharded[3:5], sharded.view(2, 96), sharded.unsqueeze(0), sharded.detach(),
             sharded.view(torch.int32), sharded.expand(2, 16, 12), *sharded.chunk(2)]  # fmt: skip
    assert all(distorch.is_sharded(view) for view in views)
    assert distorch.fetch_count() == before
    assert torch.equal(views[0] + 0, plain.t())
    assert distorch.fetch_count() == before + 1


def test_one_fetch_for_an_operator(pair):
    _, sharded = pair
    before = distorch.fetch_count()
    torch.nn.functional.linear(torch.ones(3, 12), sharded)
    assert distorch.fetch_count() == before + 1
    torch.addmm(sharded[0], torch.ones(3, 16), sharded)  # one memory for both arguments
    assert distorch.fetch_count() == before + 2


# Kept: torch.ops of torch 2.11 remembers an operator whose library is gone, and then nothing in this
# process can import Inductor ("'CustomDecompTable' object is not a mapping").
OURS = torch.library.Library("distorch_test", "DEF")  # noqa: TOR901
OURS.define("twice(Tensor x) -> Tensor")
OURS.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")


def test_custom_operator():
    weight = torch.randn(4, 4)
    sharded = distorch.shard(weight, "disk")
    assert torch.equal(torch.ops.distorch_test.twice(sharded), weight * 2)


INPLACE = {
    "add_": lambda w: w.add_(1),
    "view_write": lambda w: w[2:4].mul_(3),
    "transpose_write": lambda w: w.t()[1].zero_(),
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "copy_part": lambda w: w[1].copy_(torch.zeros(12)),
    "fill_": lambda w: w.fill_(2.5),
    "index_put": lambda w: w.__setitem__((torch.tensor([1, 2]), slice(None)), 7.0),
    "out": lambda w: torch.add(torch.ones(16, 12), 1, out=w),
    "foreach_": lambda w: torch._foreach_add_([w, w[:1]], 1.0),
    "addmm_": lambda w: w.addmm_(torch.ones(16, 3), torch.ones(3, 12)),
}


@pytest.mark.parametrize("name", INPLACE)
def test_writes_reach_the_donor(pair, name):
    plain, sharded = pair
    INPLACE[name](plain)
    INPLACE[name](sharded)
    assert distorch.is_sharded(sharded)
    assert torch.equal(distorch.materialize(sharded), plain)
    fresh = torch.ops.distorch.donor_bytes(sharded)  # the donor's own bytes, not the ring's
    assert torch.equal(fresh, plain.contiguous().view(torch.uint8).flatten())


def test_in_place_result_is_the_argument(pair):
    _, sharded = pair
    assert sharded.add_(1) is sharded


def test_failed_write_leaves_the_weight(pair):
    plain, sharded = pair
    with pytest.raises(RuntimeError):
        sharded.add_(torch.ones(5))
    assert torch.equal(sharded + 0, plain)


def test_out_that_grows():
    sharded = distorch.shard(torch.zeros(0), "disk")
    with torch.no_grad():
        torch.add(torch.ones(3), 1, out=sharded)
    assert torch.equal(sharded + 0, torch.full((3,), 2.0))


def test_raw_access_explains_itself(pair):
    _, sharded = pair
    for access in (sharded.data_ptr, sharded.detach().data_ptr, sharded.untyped_storage().data_ptr):
        with pytest.raises(RuntimeError, match=r"distorch\.materialize"):
            access()
    with pytest.raises(RuntimeError, match="undistribute"):
        sharded.set_(torch.zeros(3).untyped_storage())


def test_strides_and_alignment_are_kept():
    weight = torch.randn(32, 48)[:, ::2]
    sharded = distorch.shard(weight, "disk")
    assert sharded.stride() == weight.clone(memory_format=torch.preserve_format).stride()
    x = torch.randn(5, 24)
    reference = weight.clone(memory_format=torch.preserve_format)
    assert torch.equal(x @ sharded.t(), x @ reference.t())


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
     torch.complex64, torch.float8_e4m3fn],
)  # fmt: skip
def test_every_dtype(dtype):
    weight = torch.randint(0, 2, (8, 8)).to(dtype)
    for donor in DONORS:
        got = distorch.materialize(distorch.shard(weight, donor))
        assert torch.equal(got.view(torch.uint8), weight.view(torch.uint8))


def test_plain_tensors_are_left_alone():
    plain = torch.randn(3)
    assert not distorch.is_sharded(plain)
    assert not distorch.is_sharded(plain * 2)
    assert distorch.materialize(plain).data_ptr() != plain.data_ptr()


def test_unknown_donor():
    with pytest.raises(distorch.PlacementError, match="donor 'moon'"):
        distorch.shard(torch.zeros(2), "moon")


def test_batch_norm_statistics_reach_the_donor():
    mean, var = torch.zeros(4), torch.ones(4)
    sharded = [distorch.shard(mean, "disk"), distorch.shard(var, "disk")]
    x = torch.randn(8, 4)
    torch.nn.functional.batch_norm(x, mean, var, training=True)
    torch.nn.functional.batch_norm(x, *sharded, training=True)
    assert torch.equal(sharded[0] + 0, mean)
    assert torch.equal(sharded[1] + 0, var)


def test_error_is_ours_and_names_the_weight(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"\0" * 4096)
    place = (str(path), 0, [1024], torch.float32)
    sharded = torch.ops.distorch.shard_file(*place, "cpu", "the.weight")
    path.write_bytes(b"\0" * 100)
    with pytest.raises(FetchError, match=r"the\.weight.*4096.*100"):
        sharded + 1
    with pytest.raises(FetchError):
        sharded.requires_grad_().sum().backward()
