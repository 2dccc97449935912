# SPDX-License-Identifier: Apache-2.0
"""Inputs that other nodes give, which the host does not check."""

import math

import pytest
import torch

from distorch import SpecError

OLD = {
    "unet_name": "a", "weight_dtype": "default", "compute_device": "cpu", "virtual_vram_gb": 4.0,
    "donor_device": "disk", "expert_mode_allocations": "",
}  # fmt: skip


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
        ("virtual_vram_gb", "4", "expected a number, found '4'"),
        ("virtual_vram_gb", 10**400, "expected a number, found 1"),
        pytest.param(
            "virtual_vram_gb",
            10**5000,
            "expected a number, found a number of thousands of digits",
            id="an int that Python does not print",
        ),
        ("virtual_vram_gb", None, "expected a number, found None"),
        ("virtual_vram_gb", torch.ones(2), "expected a number, found a Tensor"),
        ("compute_device", "cuda:99", "expected one of cpu, .*found 'cuda:99'"),
        ("compute_device", "cpu\x1b[2J", r"found 'cpu\\x1b\[2J'"),
        ("compute_device", ["cpu"], "found a list"),
        ("donor_device", "../disk", "found '../disk'"),
        ("expert_mode_allocations", None, "expected text, found None"),
        ("expert_mode_allocations", ["cpu,*"], "expected text, found a list"),
        ("expert_mode_allocations", "cpu,lots;disk,*", "lots"),
        ("unet_name", "../../a", "expected one of a, found '../../a'"),
        ("weight_dtype", "x" * 1000, "found 'x{30,40}…x{30,40}'$"),
    ],
)
def test_a_linked_input_is_refused_by_name(nodes, name, value, said):
    with pytest.raises(SpecError, match=said) as raised:
        run(nodes["UNETLoaderDisTorch2MultiGPU"], **{**OLD, name: value})
    assert name in str(raised.value) or name == "expert_mode_allocations"
    assert len(str(raised.value)) < 500


def test_what_the_host_would_take_is_taken(nodes):
    for change in ({}, {"virtual_vram_gb": 1}, {"virtual_vram_gb": 0}, {"eject_models": False}):
        run(nodes["UNETLoaderDisTorch2MultiGPU"], **{**OLD, **change})
    few = {"unet_name": "a", "weight_dtype": "default"}
    (model,) = run(nodes["UNETLoaderDisTorch2MultiGPU"], **few)
    run(nodes["UNETLoaderMultiGPU"], device=None, **few)
    run(nodes["DistributeModel"], model=model, spec="cpu,1kb;disk,*")


@pytest.mark.parametrize(
    "wrong",
    [{"spec": "cpu,lots"}, {"spec": 7}, {"prefetch": "-1mb"}, {"order": "x"}, {"order": ["x"]}],
)
def test_distribute_model_refuses_what_is_linked_to_it(nodes, wrong):
    (model,) = run(nodes["UNETLoaderMultiGPU"], unet_name="a", weight_dtype="default")
    with pytest.raises(SpecError):
        run(nodes["DistributeModel"], **{"model": model, "spec": "cpu,*", **wrong})


def test_every_node_of_ours_checks(nodes):
    checked = [
        name for name, node in nodes.items() if hasattr(getattr(node, node.FUNCTION), "__wrapped__")
    ]
    assert {"DistributeModel", "DistributionReport", "UNETLoaderMultiGPU"} <= set(checked)
    assert len(checked) > 20
