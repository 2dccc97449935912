# SPDX-License-Identifier: Apache-2.0
"""A load with LoRAs that fails in the middle: the named error, the module as before, nothing left."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FetchError, FormatError, PlacementError, _donors
from distorch.loading import bring, prepare


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


def lora():
    return {f"{i}.lora_{s}.weight": torch.randn(4, 64) if s == "A" else torch.randn(64, 4)
            for i in range(6) for s in "AB"}  # fmt: skip


@pytest.fixture
def module(tmp_path):
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    yield module
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("distorch-")]
    assert left == []


def load(module, tmp_path, spec="cpu,0b;disk,*"):
    file = tmp_path / "base.safetensors"
    return distorch.load(module, file, spec, loras=[(lora(), 1.0)], min_bytes=0)


def fail_at(monkeypatch, module, name, count, error):
    """The function of that name raises at its `count`-th call."""
    real, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_an_interrupt_while_patching(module, tmp_path, monkeypatch, count):
    fail_at(monkeypatch, bring, "merged_value", count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load(module, tmp_path)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_full_disk(module, tmp_path, monkeypatch, count):
    error = PlacementError("the disk has no room")
    fail_at(monkeypatch, _donors, "shard_on", count, error)
    with pytest.raises(PlacementError, match="no room"):
        load(module, tmp_path)


def test_a_file_that_becomes_shorter(module, tmp_path, monkeypatch):
    file = tmp_path / "base.safetensors"
    real = prepare.open_checkpoint

    def opened(path, **options):
        found = real(path, **options)
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size // 2)
        return found

    monkeypatch.setattr(prepare, "open_checkpoint", opened)
    with pytest.raises((FetchError, FormatError), match=r"base\.safetensors"):
        load(module, tmp_path)


def test_nan_in_the_last_weight(module, tmp_path):
    state = lora()
    state["5.lora_B.weight"][3, 1] = torch.nan
    with pytest.raises(FormatError, match=r"5\.weight.*NaN"):
        distorch.load(module, tmp_path / "base.safetensors", "cpu,*", loras=[(state, 1.0)])


@pytest.mark.parametrize("spec", ["cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"])
@pytest.mark.parametrize("first", [[], [(lora(), 0.5)]], ids=["plain", "patched"])
def test_a_file_that_was_replaced_has_no_originals(tmp_path, spec, first):
    """Another revision, or the model itself saved over its own file: half of each would be a mix."""
    file = tmp_path / "base.safetensors"
    save_file(net().state_dict(), file)
    loaded = distorch.load(net(), file, spec, loras=first, min_bytes=0)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    save_file({name: 2 * value for name, value in before.items()}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(file)
    with pytest.raises(FetchError, match="was replaced or written to since the model was loaded"):
        distorch.set_loras(loaded, [] if first else [(lora(), 1.0)])
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    distorch.redistribute(loaded, "cpu,0b;disk,*")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_strengths_of_patches_at_fetch_need_no_file(tmp_path):
    file, state = tmp_path / "base.safetensors", lora()
    save_file(net().state_dict(), file)
    options = {"loras": [(state, 0.5)], "lora_mode": "fetch", "min_bytes": 0}
    loaded = distorch.load(net(), file, "cpu,0b;disk,*", **options)
    base = net().state_dict()["0.weight"]
    file.rename(tmp_path / "elsewhere.safetensors")
    distorch.set_loras(loaded, [(state, 1.0)])
    assert not torch.equal(loaded.state_dict()["0.weight"], base)
