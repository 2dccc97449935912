# SPDX-License-Identifier: Apache-2.0
"""A distributed module is an ordinary module: names, saving, loading, copying, converting."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import distorch
from tests.processes import donor_files, reader_threads


class Net(nn.Module):
    """Tied embedding, attention, an RNN, norms and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.rnn = nn.GRU(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, ids):
        h = self.embed(ids)
        h = self.norm(h + self.down(torch.relu(self.up(h))))
        h = h + self.attention(h, h, h)[0]
        return self.head(h + self.rnn(h)[0]) * self.scale[0]


X = torch.arange(28).reshape(4, 7)
SPECS = ["cpu,0b;disk,*", "cpu,20kb;disk,*", "cpu,50%;disk,50%", "cpu,*"]


@pytest.fixture(params=SPECS)
def twins(request):
    plain = Net()
    return plain, distorch.distribute(copy.deepcopy(plain), request.param, min_bytes=0)


def test_identity_and_names():
    module = Net()
    before = {name: id(p) for name, p in module.named_parameters()}
    assert distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0) is module
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert module.head.weight is module.embed.weight
    assert module.up.weight.device == torch.device("cpu")


def test_forward(twins):
    plain, module = twins
    for _ in range(3):
        assert torch.equal(module(X), plain(X))


def test_default_keeps_small_weights():
    module = distorch.distribute(Net(), "cpu,0b;disk,*")
    assert distorch.report(module).bytes == {"cpu": distorch.report(module).planned["cpu"]}
    assert distorch.report(module).ok


def test_report_is_measured(twins):
    _, module = twins
    report = distorch.report(module)
    assert report.ok
    assert report.bytes == {k: v for k, v in report.planned.items() if v or k == "cpu"}
    assert sum(report.bytes.values()) == sum(
        t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]
    )
    with torch.no_grad():
        module.up.weight.data = torch.zeros(64, 32)  # someone else's doing
        if report.placement["up.weight"] == "disk":
            found = distorch.report(module)
            assert not found.ok
            assert "up.weight: planned on disk, found on cpu" in found.problems


def test_state_dict_has_plain_values(twins):
    plain, module = twins
    wanted, got = plain.state_dict(), module.state_dict()
    assert list(got) == list(wanted)
    before = distorch.fetch_count()
    for name in wanted:
        assert not distorch.is_sharded(got[name])
        assert torch.equal(got[name], wanted[name])
    assert distorch.fetch_count() == before
    assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()
    assert all(distorch.is_sharded(p) for p in module.state_dict(keep_vars=True).values()
               if isinstance(p, distorch.ShardedParameter))  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(twins, assign):
    plain, module = twins
    other = Net().state_dict()
    places = distorch.report(module).placement
    module.load_state_dict({k: v.clone() for k, v in other.items()}, assign=assign)
    plain.load_state_dict(other)
    assert torch.equal(module(X), plain(X))
    assert distorch.report(module).placement == places


def test_deepcopy_is_independent(twins):
    plain, module = twins
    copied = copy.deepcopy(module)
    assert distorch.report(copied).placement == distorch.report(module).placement
    assert copied.head.weight is copied.embed.weight
    assert torch.equal(copied(X), plain(X))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(module(X), plain(X))
    assert not copied(X).any()


def test_pickle_and_torch_save(twins):
    plain, module = twins
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(module))):
        assert not any(distorch.is_sharded(p) for p in again.parameters())
        assert torch.equal(again(X), plain(X))
        assert again.head.weight is again.embed.weight
        again.double()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    again = torch.load(buffer)
    assert all(torch.equal(again[k], v) for k, v in plain.state_dict().items())


def test_safetensors(twins, tmp_path):
    plain, module = twins
    save_model(module, str(tmp_path / "m.safetensors"))
    saved = load_file(tmp_path / "m.safetensors")
    assert torch.equal(saved["up.weight"], plain.up.weight)


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_conversion_keeps_placement(twins, convert):
    plain, module = twins
    places = distorch.report(module).placement
    convert(module)
    convert(plain)
    assert distorch.report(module).placement == places
    assert module.up.weight.dtype == plain.up.weight.dtype
    assert torch.equal(module(X), plain(X))


def test_move_to_another_device_is_refused(twins):
    plain, module = twins
    if not any(distorch.is_sharded(p) for p in module.parameters()):
        pytest.skip("nothing is sharded with this placement")
    with pytest.raises(distorch.PlacementError, match="undistribute"):
        module.to("meta")
    assert torch.equal(module(X), plain(X))
    assert not any(p.is_meta for p in module.parameters())
    module.to("cpu")
    assert torch.equal(module(X), plain(X))


def test_redistribute_and_undistribute(twins):
    plain, module = twins
    for spec in SPECS:
        distorch.redistribute(module, spec)
        assert distorch.report(module).ok
        assert torch.equal(module(X), plain(X))
    assert distorch.undistribute(module) is module
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    assert module.__dict__.keys() == plain.__dict__.keys()
    assert module.up.__dict__.keys() == plain.up.__dict__.keys()
    assert all(not p.__dict__ for p in module.parameters())
    module.to("meta")
    with pytest.raises(distorch.PlacementError, match="not distributed"):
        distorch.report(module)


def test_parts_can_be_used_alone(twins):
    plain, module = twins
    h = torch.randn(2, 3, 32)
    assert torch.equal(copy.deepcopy(module.up)(h), plain.up(h))
    weights = dict(module.up.named_parameters())
    assert torch.equal(torch.func.functional_call(module.up, weights, (h,)), plain.up(h))


def test_values_for_people(twins):
    plain, module = twins
    assert repr(module.up.weight).split("requires")[0] == repr(plain.up.weight).split("requires")[0]
    assert module.up.weight.tolist() == plain.up.weight.tolist()
    assert (module.up.weight.numpy(force=True) == plain.up.weight.detach().numpy()).all()
    for view in (lambda w: w.data, lambda w: w.detach().t(), lambda w: w[1, :2].detach()):
        ours, theirs = view(module.up.weight), view(plain.up.weight)
        assert repr(ours) == repr(theirs)
        assert ours.tolist() == theirs.tolist()
        assert (ours.numpy() == theirs.numpy()).all()
    with pytest.raises(RuntimeError, match="requires grad"):
        module.up.weight.numpy()
    assert module.up.weight.is_shared() is False
    assert module.up.weight.new_tensor([1.0]).item() == 1


def test_threads(twins):
    plain, module = twins
    wanted, failures = plain(X), []

    def work():
        for _ in range(10):
            with torch.no_grad():
                if not torch.equal(module(X), wanted):
                    failures.append("bits differ")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_plan_roundtrip(tmp_path):
    module, plain = Net(), Net()
    plain.load_state_dict(module.state_dict())
    plan = distorch.plan(module, "cpu,20kb;disk,*", min_bytes=0)
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    plan.save(tmp_path / "plan.json")
    distorch.distribute(module, plan=distorch.Plan.load(tmp_path / "plan.json"))
    assert distorch.report(module).ok
    assert distorch.report(module).bytes == plan.bytes
    assert torch.equal(module(X), plain(X))
    with pytest.raises(distorch.PlacementError, match="no place for"):
        distorch.distribute(nn.Linear(3, 3), plan=plan)


def test_stats():
    module = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    with torch.no_grad():
        module(X)
        first = distorch.stats(module)
        assert first.bytes["disk->cpu"] == distorch.report(module).bytes["disk"]
        distorch.reset_stats(module)
        module(X)
    second = distorch.stats(module)
    assert second.fetches == first.fetches > 0
    assert second.hits == second.fetches
    assert second.bytes == {}


@pytest.mark.parametrize(("spec", "told"), [("cpu,0b;disk,*", True), ("cpu,*", False)])
def test_a_small_model_that_stays_whole_says_why(spec, told):
    report = distorch.report(distorch.distribute(nn.Linear(4, 4), spec))
    assert report.ok
    assert report.spec == spec
    assert ("80 B cannot leave cpu" in str(report)) == told


def test_bad_specs_move_nothing():
    module = Net()
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    for spec in ("cpu,2xb", "cuda:9,1gb;cpu,*", "", "cpu,1b", "cpu,*;disk,900000tb"):
        with pytest.raises(distorch.DistorchError):
            distorch.distribute(module, spec, min_bytes=0)
    with pytest.raises(distorch.SpecError):
        distorch.distribute(module)
    with pytest.raises(distorch.SpecError):
        distorch.distribute(module, "cpu,*", compress="always")
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before


def test_everything_is_given_back():
    module = distorch.distribute(Net(), "cpu,0b;disk,*", min_bytes=0)
    module(X)
    assert donor_files()
    assert reader_threads()
    distorch.undistribute(module)
    gc.collect()
    assert donor_files() == []
    assert reader_threads() == 0
