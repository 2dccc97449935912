# SPDX-License-Identifier: Apache-2.0
"""Inputs that other nodes give, which the host does not check."""

import math

import numpy as np
import pytest
import torch

from distorch import SpecError
from distorch.testing import sim

OLD = {
    "unet_name": "a", "weight_dtype": "default", "compute_device": "cpu", "virtual_vram_gb": 4.0,
    "donor_device": "disk", "expert_mode_allocations": "",
}  # fmt: skip

# What the host would take or convert if it were typed, and names that mean one of the list.
LIKE_TYPED = [
    ("virtual_vram_gb", 1), ("virtual_vram_gb", 0), ("virtual_vram_gb", "4"),
    ("virtual_vram_gb", np.float32(4)), ("virtual_vram_gb", torch.tensor(4.0)),
    ("virtual_vram_gb", None), ("expert_mode_allocations", None), ("donor_device", None),
    ("donor_device", "disk,cpu"), ("donor_device", " disk"), ("compute_device", None),
    ("compute_device", torch.device("cpu")), ("eject_models", 0), ("eject_models", None),
    ("unet_name", "./a"), ("unet_name", "x\\..\\a"),
]  # fmt: skip


@pytest.fixture
def nodes(host):
    from distorch.comfy import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS


def run(node, **inputs):
    return getattr(node(), node.FUNCTION)(**inputs)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("virtual_vram_gb", math.nan, "expected a number, found nan"),
        ("virtual_vram_gb", math.inf, "expected a number, found inf"),
        ("virtual_vram_gb", "four", "expected a number, found 'four'"),
        ("virtual_vram_gb", [4.0], "expected a number, found a list"),
        ("virtual_vram_gb", 10**400, "expected a number, found 1"),
        pytest.param(
            "virtual_vram_gb",
            10**5000,
            "expected a number, found a number of thousands of digits",
            id="an int that Python does not print",
        ),
        ("virtual_vram_gb", torch.ones(2), "expected a number, found a Tensor"),
        ("compute_device", "cuda:99", "expected one of cpu, .*found 'cuda:99'"),
        ("compute_device", "cpu\x1b[2J", r"found 'cpu\\x1b\[2J'"),
        ("compute_device", ["cpu"], "found a list"),
        ("donor_device", "../disk", "found '../disk'"),
        ("donor_device", "disk,../disk", "found 'disk,../disk'"),
        ("eject_models", [1], "expected true or false, found a list"),
        ("expert_mode_allocations", ["cpu,*"], "expected text, found a list"),
        ("expert_mode_allocations", "cpu,lots;disk,*", "lots"),
        ("unet_name", "../../a", "expected one of a, found '../../a'"),
        ("unet_name", "/models/a", "expected one of a, found '/models/a'"),
        ("unet_name", None, "expected one of a, found None"),
        ("weight_dtype", "x" * 1000, "found 'x{30,40}…x{30,40}'$"),
    ],
)
def test_a_linked_input_is_refused_by_name(nodes, name, value, said):
    with pytest.raises(SpecError, match=said) as raised:
        run(nodes["UNETLoaderDisTorch2MultiGPU"], **{**OLD, name: value})
    assert name in str(raised.value) or name == "expert_mode_allocations"
    assert len(str(raised.value)) < 500


def test_what_the_host_would_take_is_taken(nodes):
    for name, value in LIKE_TYPED:
        run(nodes["UNETLoaderDisTorch2MultiGPU"], **{**OLD, name: value})
    few = {"unet_name": "a", "weight_dtype": "default"}
    (model,) = run(nodes["UNETLoaderDisTorch2MultiGPU"], **few)
    run(nodes["UNETLoaderMultiGPU"], device=None, **few)
    made = nodes["DistributeModel"]()
    made.distribute(model, "cpu,*", prefetch=0)  # as other packs may call it
    with pytest.raises(SpecError, match="input 'order'"):
        made.distribute(model, "cpu,*", "cpu", "x")


def test_a_kind_of_device_is_its_first_one(nodes, host):
    sim.configure(devices=2)
    loader = nodes["UNETLoaderMultiGPU"]
    for device in ("sim", " sim:0 ", torch.device("sim:0")):
        (model,) = run(loader, unet_name="a", weight_dtype="default", device=device)
        assert str(model.load_device) == "sim:0"


def test_classes_that_others_derive_have_their_own_choices(nodes):
    class Other(nodes["UNETLoaderMultiGPU"]):
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"unet_name": (["a", "b"],), "weight_dtype": (["default"],)}}

    run(Other, unet_name="b", weight_dtype="default")
    with pytest.raises(SpecError, match="expected one of a, b, found 'c'"):
        run(Other, unet_name="c", weight_dtype="default")


@pytest.mark.parametrize(
    "wrong",
    [
        {"spec": "cpu,lots"},
        {"spec": 7},
        {"prefetch": "-1mb"},
        {"order": "x"},
        {"order": ["x"]},
        {"prefetch": []},
    ],
)
def test_distribute_model_refuses_what_is_linked_to_it(nodes, wrong):
    (model,) = run(nodes["UNETLoaderMultiGPU"], unet_name="a", weight_dtype="default")
    with pytest.raises(SpecError):
        run(nodes["DistributeModel"], **{"model": model, "spec": "cpu,*", **wrong})


def test_every_node_of_ours_checks(nodes):
    for name, node in nodes.items():
        assert hasattr(vars(node)[node.FUNCTION], "__wrapped__"), name
