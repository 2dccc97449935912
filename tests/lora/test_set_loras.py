# SPDX-License-Identifier: Apache-2.0
"""set_loras: another set, another strength; the same bits as a fresh load, and back to the file's."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FetchError, FormatError, PlacementError, SpecError
from distorch.lora import patches as lora_patches
from distorch.patching import forms
from distorch.runtime.distribution import distribution_of

SPECS = ["cpu,*", "cpu,0b;disk,*", "cpu,6kb;disk,*"]
MODES = ["merge", "fetch", "background"]


class Net(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, dtype=dtype) for _ in range(4))
        self.head = nn.Linear(32, 8, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def lora(seed=0, layers=(0, 2), scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in layers:
        state[f"layers.{i}.lora_A.weight"] = torch.randn(4, 32, generator=generator) * scale
        state[f"layers.{i}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    return state


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def values(model):
    return {name: distorch.materialize(p) for name, p in model.named_parameters()}


def assert_same(model, other):
    expected = values(other) if isinstance(other, nn.Module) else other
    for name, value in values(model).items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(bits(value), bits(expected[name])), name


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def load(path, spec, loras=(), **options):
    return distorch.load(Net(), path, spec, loras=loras, min_bytes=0, prefetch="64kb", **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bits_as_a_fresh_load(path, spec, mode):
    one, two = lora(0), lora(1, (1, 2))
    plain = values(load(path, "cpu,*"))
    model = load(path, spec, [(one, 0.5)], lora_mode=mode)
    assert_same(model, load(path, "cpu,*", [(one, 0.5)]))
    for loras in (
        [(one, 0.9)],
        [(two, -1.0), (one, 0.3)],
        [(one, 0.3), (two, -1.0)],
        [],
        [(two, 2.0)],
    ):
        assert distorch.set_loras(model, loras) is model
        assert_same(model, load(path, "cpu,*", loras))
        assert distorch.report(model).ok, distorch.report(model).problems
    x = torch.randn(3, 32).bfloat16()
    assert torch.equal(model(x), load(path, "cpu,*", [(two, 2.0)])(x))
    distorch.set_loras(model, [])
    assert_same(model, plain)
    distorch.redistribute(model, "cpu,50%;disk,50%")
    distorch.set_loras(model, [(one, 1.0)])
    assert_same(distorch.undistribute(model), load(path, "cpu,*", [(one, 1.0)]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_same_bits_where_the_file_has_another_dtype(tmp_path, spec, mode, dtypes):
    """The file's numbers and the LoRA are added in float32, and rounded once to the dtype asked for."""
    stored, dtype = (getattr(torch, name) for name in dtypes)
    torch.manual_seed(0)
    save_file(Net(stored).state_dict(), tmp_path / "base.safetensors")
    model = load(tmp_path / "base.safetensors", spec, lora_mode=mode, dtype=dtype)
    for loras in ([(lora(), 0.7)], [(lora(), 0.2), (lora(1), -1.0)], []):
        distorch.set_loras(model, loras)
        distorch.finish_merging(model)
        fresh = load(tmp_path / "base.safetensors", spec, loras, lora_mode=mode, dtype=dtype)
        assert_same(model, fresh)
        assert {p.dtype for p in model.parameters()} == {dtype}
        x = torch.randn(3, 32, dtype=dtype)
        assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_module_that_has_no_file(path, spec, mode):
    model = Net()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(plain, path.with_name("same.safetensors"))
    distorch.distribute(model, spec, min_bytes=0)
    distorch.set_loras(model, [(lora(), 0.5)], lora_mode=mode)
    assert_same(model, load(path.with_name("same.safetensors"), "cpu,*", [(lora(), 0.5)]))
    distorch.set_loras(model, [(lora(), 0.7)])
    assert_same(model, load(path.with_name("same.safetensors"), "cpu,*", [(lora(), 0.7)]))
    distorch.set_loras(model, [])
    assert_same(model, plain)


def test_modes_can_be_changed(path):
    expected = load(path, "cpu,*", [(lora(), 0.5)])
    model = load(path, "cpu,6kb;disk,*", [(lora(), 0.5)], lora_mode="merge")
    for mode in ("fetch", "merge", "background", "fetch", "background", "merge"):
        distorch.set_loras(model, [(lora(), 0.5)], lora_mode=mode)
        assert_same(model, expected)


def test_only_touched_weights_are_computed_again(path, monkeypatch):
    one, two = lora(0, (0,)), lora(1, (3,))
    model = load(path, "cpu,*", [(one, 0.5), (two, 0.5)])
    merged = []
    real = lora_patches.merge
    monkeypatch.setattr(
        "distorch.patching.forms.merge",
        lambda p, *a, **k: merged.append(p[0][0].weight) or real(p, *a, **k),
    )
    distorch.set_loras(model, [(one, 0.5), (two, 0.9)])
    assert merged == ["layers.3.weight"]
    distorch.set_loras(model, [(one, 0.5), (two, 0.9)])
    assert merged == ["layers.3.weight"]


def test_at_fetch_nothing_but_factors_is_added(path):
    """The donors keep the base: in the file, without a copy."""
    model = load(path, "cpu,0b;disk,*", [(lora(), 0.5)], lora_mode="fetch")
    assert (
        distorch.report(model).bytes["disk"]
        == distorch.plan(Net(), "cpu,0b;disk,*", min_bytes=0).bytes["disk"]
    )
    state = model.state_dict()
    assert_same(load(path, "cpu,*", [(lora(), 0.5)]), state)


def test_loras_can_be_changed_after_an_interrupt_at_the_end_of_a_move(path, monkeypatch):
    """Ctrl-C may come when the weights are moved already, and again while that is noted down."""
    from distorch.patching.state import Patching
    from distorch.runtime import placing

    one = lora(0, (0, 1, 2, 3))
    model = load(path, "cpu,*", [(one, 0.5)])
    before, calls = values(model), []
    real, noted = placing._install, Patching._put_all

    def installed(*args):
        real(*args)
        calls.append("moved")
        raise KeyboardInterrupt

    def put_all(self, module, names):
        if calls == ["moved"]:
            calls.append("noted")
            raise KeyboardInterrupt
        noted(self, module, names)

    monkeypatch.setattr(Patching, "_put_all", put_all)
    with monkeypatch.context() as patched:
        patched.setattr(placing, "_install", installed)
        with pytest.raises(KeyboardInterrupt):
            distorch.redistribute(model, "cpu,0b;disk,*")
    assert calls == ["moved", "noted"]
    assert_same(model, before)
    distorch.set_loras(model, [(one, 0.25)])
    calls.clear()
    real_place = placing._place

    def placed(*args):
        real_place(*args)
        raise KeyboardInterrupt  # all is done, and this is on the way out

    monkeypatch.setattr(placing, "_place", placed)
    with pytest.raises(KeyboardInterrupt):
        distorch.redistribute(model, "cpu,0b;disk,*")
    distorch.set_loras(model, [(one, 0.5)])
    assert_same(model, before)


def test_an_interrupt_leaves_the_loras_that_were_there(path, monkeypatch):
    one = lora(0, (0, 1, 2, 3))
    model = load(path, "cpu,6kb;disk,*", [(one, 0.5)])
    before, calls = values(model), []
    real = lora_patches.merge

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("distorch.patching.forms.merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distorch.set_loras(model, [(one, 0.9)])
    monkeypatch.undo()
    assert_same(model, before)
    distorch.set_loras(model, [(one, 0.9)])
    assert_same(model, load(path, "cpu,*", [(one, 0.9)]))


def test_errors_leave_the_loras_that_were_there(path, tmp_path):
    one = lora()
    model = load(path, "cpu,6kb;disk,*", [(one, 0.5)])
    before = values(model)
    bad = lora(3)
    bad["layers.2.lora_B.weight"][5, 1] = torch.nan
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for loras, error in (
        ([(one, 0.1), (bad, 0.5)], FormatError),
        ([(tmp_path / "cut.safetensors", 1.0)], FormatError),
        ([(tmp_path / "gone.safetensors", 1.0)], FormatError),
        ([({"other.lora_A.weight": torch.ones(2, 2)}, 1.0)], FormatError),
        ([(one, float("nan"))], SpecError),
        ([one], SpecError),
    ):
        with pytest.raises(error):
            distorch.set_loras(model, loras)
        assert_same(model, before)
    with pytest.raises(SpecError, match="lora_mode"):
        distorch.set_loras(model, [], lora_mode="later")
    with pytest.raises(PlacementError, match="not distributed"):
        distorch.set_loras(Net(), [])


def test_a_written_weight_is_not_lost(path):
    model = load(path, "cpu,*", [(lora(0, (0,)), 0.5)])
    with torch.no_grad():
        model.layers[1].weight.mul_(2)
    doubled = distorch.materialize(model.layers[1].weight)
    distorch.set_loras(model, [(lora(0, (0, 1)), 0.0), (lora(0, (0,)), 0.2)])
    assert torch.equal(distorch.materialize(model.layers[1].weight), doubled)
    distorch.set_loras(model, [(lora(1, (1,)), 1.0)])
    distorch.set_loras(model, [])
    assert torch.equal(distorch.materialize(model.layers[1].weight), doubled)
    distorch.set_loras(model, [(lora(0, (0,)), 0.5)])
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    with pytest.raises(PlacementError, match=r"layers\.0\.weight.*was written to"):
        distorch.set_loras(model, [])


def test_copies_have_loras_of_their_own(path):
    model = load(path, "cpu,6kb;disk,*", [(lora(), 0.5)], lora_mode="fetch")
    other = copy.deepcopy(model)
    assert_same(other, model)
    distorch.set_loras(other, [(lora(1), 1.0)])
    assert_same(model, load(path, "cpu,*", [(lora(), 0.5)]))
    assert_same(other, load(path, "cpu,*", [(lora(1), 1.0)]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
def test_copies_have_originals_of_their_own(spec, mode):
    """Where there is no file, they are in memory, and somebody may write to the first model's."""
    torch.manual_seed(0)
    plain = Net()
    model = distorch.distribute(copy.deepcopy(plain), spec, compute="cpu", min_bytes=0)
    with torch.no_grad():
        model.head.weight.add_(0)  # written to once
    distorch.set_loras(model, [(lora(), 0.5)], lora_mode=mode)
    other = copy.deepcopy(model)
    distorch.set_loras(model, [])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    distorch.set_loras(other, [(lora(1), 1.0)])
    distorch.set_loras(other, [])
    assert_same(other, values(plain))


@pytest.mark.parametrize("mode", MODES)
def test_originals_come_back_where_the_plan_is_now(mode):
    torch.manual_seed(0)
    plain = Net()
    model = distorch.distribute(copy.deepcopy(plain), "cpu,*", compute="cpu", min_bytes=0)
    for there, back in (("cpu,0b;disk,*", "cpu,*"), ("cpu,6kb;disk,*", "disk,*")):
        distorch.set_loras(model, [(lora(), 0.5)], lora_mode=mode)
        distorch.redistribute(model, there)
        distorch.set_loras(model, [])
        assert distorch.report(model).ok
        assert_same(model, values(plain))
        distorch.redistribute(model, back)


@pytest.mark.parametrize("mode", MODES)
def test_other_data_for_a_weight_without_loras_are_its_original(mode):
    """`.data = ` is no write that a version counts."""
    model = distorch.distribute(Net(), "cpu,*", compute="cpu", min_bytes=0)
    distorch.set_loras(model, [(lora(), 0.5)], lora_mode=mode)
    distorch.set_loras(model, [])
    other = Net()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()
    distorch.set_loras(model, [(lora(1), 0.5)])
    distorch.set_loras(model, [])
    assert_same(model, values(other))


@pytest.mark.parametrize("mode", MODES)
def test_the_model_runs_meanwhile_in_another_thread(path, mode):
    one = lora(0, (0, 1, 2, 3), 0.01)
    model = load(path, "cpu,0b;disk,*", [(one, 0.5)], lora_mode=mode)
    x, failures, stop = torch.randn(2, 32).bfloat16(), [], threading.Event()

    def run():
        try:
            while not stop.is_set():
                assert torch.isfinite(model(x)).all()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for i in range(20):
        distorch.set_loras(model, [(one, 0.1 * (i + 1))])
    stop.set()
    thread.join()
    assert not failures
    assert_same(model, load(path, "cpu,*", [(one, 0.1 * 20)]))


def test_report_says_what_was_patched(path):
    state = lora() | {
        "lora_te_x.lora_up.weight": torch.ones(2, 2),
        "lora_te_x.lora_down.weight": torch.ones(2, 2),
    }
    model = load(path, "cpu,*", [(state, 0.5)])
    (row,) = distorch.report(model).loras
    assert (row["strength"], row["weights"], row["unmatched"], row["for other models"]) == (
        0.5,
        2,
        [],
        1,
    )
    assert "2 weights" in str(distorch.report(model))


def test_files_are_read_once(path, tmp_path, monkeypatch):
    file = tmp_path / "style.safetensors"
    save_file(lora(), file)
    model = load(path, "cpu,*", [(file, 0.5)])
    monkeypatch.setattr("distorch.lora.resolve.read_lora", lambda source: pytest.fail("read again"))
    distorch.set_loras(model, [(file, 0.7)])
    monkeypatch.undo()
    save_file(lora(9), file)  # another file under the same name is read
    distorch.set_loras(model, [(Path(file), 0.7)])
    assert_same(model, load(path, "cpu,*", [(lora(9), 0.7)]))


def test_an_error_before_a_weight_is_touched_leaves_what_is_known_of_it(monkeypatch):
    """An original that is kept over a weight's memory would keep that memory for ever."""
    model = distorch.distribute(Net(), "cpu,*", min_bytes=0)
    merged, calls = forms.merged_value, []

    def fails_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merged(*arguments, **options)

    monkeypatch.setattr(forms, "merged_value", fails_at_the_second)
    before = values(model)
    with pytest.raises(KeyboardInterrupt):
        distorch.set_loras(model, [(lora(), 1.0)])
    assert_same(model, before)
    assert distribution_of(model).patching.originals == {}


def test_merging_what_was_patched_at_fetch_needs_no_file(path):
    """The original is in memory then. The file may be another one by now."""
    model, loras = load(path, "cpu,*"), [(lora(), 0.5)]
    merged = values(load(path, "cpu,*", loras))
    distorch.set_loras(model, loras, lora_mode="fetch")
    save_file({name: value + 1 for name, value in Net().state_dict().items()}, path)
    distorch.set_loras(model, loras, lora_mode="merge")
    assert_same(model, merged)
    with pytest.raises(FetchError, match="was replaced or written to since"):
        distorch.set_loras(model, [])
    assert_same(model, merged)
