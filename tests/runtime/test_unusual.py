# SPDX-License-Identifier: Apache-2.0
"""Modules whose parameters are not plain strided memory, and tools that look inside modules."""

import copy
import gc
import io
import os
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import distorch

DISK = "cpu,0b;disk,*"


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))


def lazily_conjugated():
    return torch.randn(4, 4, dtype=torch.complex64).conj()


@pytest.mark.parametrize("spec", [DISK, "cpu,*"])
@pytest.mark.parametrize(
    "make", [lazily_conjugated, lambda: lazily_conjugated().imag], ids=["conjugate", "negative"]
)
def test_lazy_bits_stay(spec, make):
    module = Holder(w=make())
    expected = module.w.detach().clone()
    distorch.distribute(module, spec, min_bytes=0)
    assert torch.equal(module.w.abs(), expected.abs())
    assert torch.equal(module.w.detach().clone(), expected)
    assert torch.equal(module.state_dict()["w"], expected)
    distorch.undistribute(module)
    assert torch.equal(module.w, expected)


def test_shard_of_a_conjugate():
    tensor = lazily_conjugated()
    assert torch.equal(distorch.materialize(distorch.shard(tensor, "disk")), tensor)


def test_sparse_and_nested_stay_resident():
    sparse = torch.eye(8).to_sparse()
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    module = Holder(coo=sparse, csr=sparse.to_sparse_csr(), nested=nested, w=torch.randn(8, 8))
    plan = distorch.plan(module, DISK, min_bytes=0)
    assert plan.sizes["coo"] == 8 * (2 * 8 + 4)
    assert plan.sizes["csr"] == 9 * 8 + 8 * (8 + 4)
    assert plan.sizes["nested"] == 5 * 8 * 4
    assert plan.placement == {"coo": "cpu", "csr": "cpu", "nested": "cpu", "w": "disk"}
    distorch.distribute(module, DISK, min_bytes=0)
    report = distorch.report(module)
    assert report.ok, report.problems
    assert torch.equal(module.coo.to_dense(), torch.eye(8))
    distorch.undistribute(module)
    assert not distorch.is_sharded(module.w)


def test_lazy_module_is_refused():
    with pytest.raises(distorch.PlacementError, match="run the model once"):
        distorch.distribute(nn.Sequential(nn.LazyLinear(8)), DISK)


def test_scripted_module_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(distorch.PlacementError, match="TorchScript"):
        distorch.distribute(scripted, DISK, min_bytes=0)


def test_traced():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(2, 8)
    expected = module(x)
    distorch.distribute(module, DISK, min_bytes=0)
    assert torch.equal(torch.jit.trace(module, x)(x), expected)


def test_encoder_with_padding_mask():
    """In eval mode its layers run on nested activations."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        distorch.distribute(model, DISK, min_bytes=0)
        assert torch.equal(model(x, src_key_padding_mask=mask), expected)


def test_data_replaced_by_a_plain_tensor():
    module = Holder(w=torch.randn(4, 4))
    distorch.distribute(module, DISK, min_bytes=0)
    module.w.data = torch.ones(4, 4)
    copied = torch.nn.Parameter.__deepcopy__(module.w, {})
    assert torch.equal(module.w.__deepcopy__({}), copied)
    assert module.w.tolist() == torch.ones(4, 4).tolist()
    assert module.w.numpy().sum() == 16
    assert "1." in repr(module.w)


def test_wrapper_subclass_stays_resident():
    halves = TwoTensor(torch.randn(4, 4), torch.randn(4, 4))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].weight = nn.Parameter(halves)
    x = torch.randn(2, 4)
    expected = module(x)
    distorch.distribute(module, DISK, min_bytes=0)
    assert distorch.report(module).ok
    assert distorch.is_sharded(module[1].weight)
    got = module(x)
    assert torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8),
        lambda: TwoTensor(torch.randn(4, 4), torch.randn(4, 4)),
    ],
    ids=["sparse", "quantised", "wrapper"],
)
def test_shard_takes_plain_memory_only(make):
    with pytest.raises(distorch.PlacementError, match="expected plain memory"):
        distorch.shard(make())


@pytest.mark.parametrize("donor", ["cpu", "disk"])
def test_a_sharded_tensor_prints_and_copies(donor):
    tensor = torch.arange(4.0)
    sharded = distorch.shard(tensor, donor)
    assert repr(sharded) == repr(tensor)
    assert sharded.tolist() == tensor.tolist()
    assert distorch.shard(tensor, donor).tolist() == tensor.tolist()
    assert distorch.shard(nn.Parameter(tensor), donor).tolist() == tensor.tolist()
    copied = copy.deepcopy(sharded)
    assert type(copied) is torch.Tensor and distorch.is_sharded(copied)
    assert torch.equal(copied + 0, tensor)
    assert torch.equal(pickle.loads(pickle.dumps(sharded)), tensor)
    assert not sharded.is_shared()
    assert not sharded[1:].is_shared()


@pytest.mark.parametrize("donor", ["cpu", "disk"])
def test_whether_memory_is_shared(donor):
    """torch would end the process when the storage refused to say where it is."""
    module = Holder(w=torch.randn(4, 4))
    distorch.distribute(module, f"cpu,0b;{donor},*" if donor == "disk" else "cpu,*", min_bytes=0)
    gc.collect()
    for tensor in (module.w, module.w.data, module.w.detach()[1], copy.deepcopy(module).w.data):
        assert not tensor.is_shared()
        assert not tensor.untyped_storage().is_shared()


def test_distributed_in_inference_mode_trains_outside():
    module = nn.Linear(4, 4)
    with torch.inference_mode():
        distorch.distribute(module, DISK, min_bytes=0)
        module(torch.ones(1, 4))
    module(torch.ones(1, 4)).sum().backward()
    assert module.weight.grad is not None
    with torch.inference_mode():
        distorch.undistribute(module)
    assert not module.weight.is_inference()


def test_a_state_dict_that_was_written_to():
    module = Holder(w=torch.ones(4, 4))
    distorch.distribute(module, DISK, min_bytes=0)
    mine = module.state_dict()
    mine["w"].mul_(0)
    assert torch.equal(module.state_dict()["w"], torch.ones(4, 4))
    module.w.fill_(9)
    assert torch.equal(module.state_dict()["w"], torch.full((4, 4), 9.0))
    assert torch.equal(mine["w"], torch.zeros(4, 4))


def test_saved_after_its_data_was_replaced(tmp_path):
    module = Holder(w=torch.randn(4, 4))
    distorch.distribute(module, DISK, min_bytes=0)
    module.w.data = torch.ones(4, 4)
    assert torch.equal(pickle.loads(pickle.dumps(module.w)), torch.ones(4, 4))


def test_back_to_a_disk_whose_file_is_gone(tmp_path):
    path = tmp_path / "w.safetensors"
    expected = torch.randn(4, 4)
    save_file({"w": expected}, path)
    module = distorch.load(Holder(w=torch.zeros(4, 4)), path, DISK, min_bytes=0)
    distorch.redistribute(module, "cpu,*")
    path.unlink()
    distorch.redistribute(module, DISK)
    assert distorch.report(module).ok
    assert torch.equal(module.w + 0, expected)


def in_a_fork(work):
    """Runs `work` in a forked child and fails unless it returns."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_does_not_touch_the_donors_of_its_parent():
    module = nn.Linear(64, 64)
    expected = module.weight.detach().clone()
    distorch.distribute(module, DISK, min_bytes=0, prefetch=0)
    kept = []

    def work():
        with torch.no_grad():
            module.weight.zero_()
        kept.append(distorch.shard(torch.full((4096,), 7.0), "disk"))
        assert not module.weight.any()
        distorch.undistribute(module)

    in_a_fork(work)
    other = distorch.shard(torch.full((4096,), 5.0), "disk")
    assert torch.equal(module.weight + 0, expected)
    assert torch.equal(other + 0, torch.full((4096,), 5.0))


def test_a_fork_reads_on_when_its_parent_lets_go():
    module = nn.Linear(64, 64)
    expected = module.weight.detach().clone()
    distorch.distribute(module, DISK, min_bytes=0, prefetch=0)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read_end, 1)
        os._exit(0 if torch.equal(module.weight + 0, expected) else 1)
    distorch.undistribute(module)
    os.write(write_end, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def linears(count=3):
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))


def test_a_file_of_parameters_opens_without_distorch():
    module = distorch.distribute(linears(), DISK, min_bytes=0)
    buffer = io.BytesIO()
    torch.save({**dict(module.named_parameters()), "one": distorch.shard(torch.ones(2))}, buffer)
    assert b"distorch" not in buffer.getvalue()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert type(saved["0.weight"]) is nn.Parameter
    assert torch.equal(saved["0.weight"], module[0].weight)
    assert saved["one"].tolist() == [1, 1]


def test_memory_between_processes_is_refused():
    module = distorch.distribute(linears(), DISK, min_bytes=0)
    for attempt in (module.share_memory, lambda: ForkingPickler.dumps(module[0].weight)):
        with pytest.raises(distorch.PlacementError, match="state_dict"):
            attempt()
    assert distorch.report(module).ok
    assert ForkingPickler.dumps(module.state_dict())


def test_a_whole_takes_over_its_parts():
    module = nn.Sequential(linears(), linears())
    x = torch.randn(2, 16)
    wanted = module(x)
    distorch.distribute(module[0], DISK, min_bytes=0)
    distorch.distribute(module, "cpu,50%;disk,50%", min_bytes=0)
    assert distorch.report(module).ok
    with pytest.raises(distorch.PlacementError, match="not distributed"):
        distorch.report(module[0])
    distorch.distribute(module[1], DISK, min_bytes=0)
    assert not distorch.report(module).ok
    assert distorch.report(module[1]).ok
    distorch.undistribute(module)
    assert not any("_distorch" in part.__dict__ for part in module.modules())
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert torch.equal(module(x), wanted)


def test_a_converted_model_that_outgrew_its_plan():
    module = distorch.distribute(linears(), DISK, min_bytes=0)
    assert distorch.report(module.half()).ok
    (problem, *_) = distorch.report(module.double()).problems
    assert "0.weight: planned 1024 bytes, found 2048" in problem
    assert distorch.report(distorch.redistribute(module, DISK)).ok


def test_a_conversion_that_fails_changes_no_weight():
    module = distorch.distribute(linears(), DISK, min_bytes=0)
    wanted, calls = module(torch.ones(1, 16)), []

    def convert(tensor):
        calls.append(tensor)
        if len(calls) == 6:
            raise MemoryError
        return tensor * 2

    with pytest.raises(MemoryError):
        module._apply(convert)
    assert torch.equal(module(torch.ones(1, 16)), wanted)
    assert distorch.report(module).ok


def test_peft_merges_a_tied_model():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).eval()
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(plain, lora)
    module = distorch.distribute(copy.deepcopy(adapted), DISK, min_bytes=0)
    ids = torch.arange(12)[None]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Input and output embeddings")
        ours, theirs = module.merge_and_unload(), adapted.merge_and_unload()
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.tie_word_embeddings is True
    with pytest.raises(RuntimeError, match="materialize"):
        ours.lm_head.weight.data_ptr()


def test_an_encoder_layer_by_itself_takes_its_fast_path():
    """A hook on it would send it another way, which under autocast gives another dtype."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        distorch.distribute(layer, DISK, min_bytes=0)
        got = layer(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_weight_is_set_to_another_sharded_one():
    """As a parametrisation does it, with the weight itself."""
    module = nn.Linear(4, 4)
    plain = copy.deepcopy(module)
    distorch.distribute(module, DISK, min_bytes=0)
    for each in (module, plain):
        nn.utils.parametrize.register_parametrization(each, "weight", Halved())
    x = torch.randn(2, 4)
    assert torch.equal(module(x), plain(x))
    assert distorch.is_sharded(module.parametrizations.weight.original)
    one, other = distorch.shard(torch.zeros(4), "disk"), distorch.shard(torch.ones(2), "cpu")
    one.set_(other)
    assert one.shape == (2,) and torch.equal(one + 0, torch.ones(2))
