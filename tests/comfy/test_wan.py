# SPDX-License-Identifier: Apache-2.0
"""Block swap for WanVideoWrapper, against a model and a sampler that behave as theirs do."""

import types

import pytest
import torch
from torch import nn

import distorch
from distorch.errors import SpecError
from distorch.runtime.distribution import is_distributed
from tests.comfy.test_nodes import installed, run  # noqa: F401 (a fixture)

DEVICE, BLOCKS = "sim:0", 4
X = torch.ones(2, 64)


def _values():
    torch.manual_seed(0)
    return {name: torch.randn(p.shape) * 0.1 for name, p in Transformer("meta").named_parameters()}


class Transformer(nn.Module):
    """Blocks of which some are fetched and put back in every step."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.text_embedding = nn.Linear(64, 64, device=device)
        self.blocks = nn.ModuleList(nn.Linear(64, 64, device=device) for _ in range(BLOCKS))
        self.head = nn.Linear(64, 64, device=device)
        self.blocks_to_swap, self.offload_txt_emb, self.offload_img_emb = -1, False, False
        self.moved = 0

    def _move(self, module, device):
        self.moved += 1
        module.to(device)

    def forward(self, x):
        if self.offload_txt_emb:
            self._move(self.text_embedding, DEVICE)
        x = self.text_embedding(x)
        if self.offload_txt_emb:
            self._move(self.text_embedding, "cpu")
        for index, block in enumerate(self.blocks):
            swapped = self.blocks_to_swap > 0 and index >= BLOCKS - self.blocks_to_swap
            if swapped:
                self._move(block, DEVICE)
            x = torch.tanh(block(x))
            if swapped:
                self._move(block, "cpu")
        return self.head(x)


class Inner:
    """Their model: weights come when sampling begins, as long as `sd` is there."""

    def __init__(self, **items):
        self.diffusion_model = Transformer("meta")
        self.items = {"sd": _values(), **items}

    def __getitem__(self, name):
        return self.items[name]


class Sampler:
    RETURN_TYPES, FUNCTION = ("LATENT",), "process"
    fails = False

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("M",), "force_offload": ("BOOLEAN",)}}

    def process(self, model, force_offload):
        transformer = model.model.diffusion_model
        swap = model.model_options["transformer_options"].get("block_swap_args")
        swap = swap or model.model["block_swap_args"]
        for name, value in model.model["sd"].items():
            owner, _, key = name.rpartition(".")
            parameter = nn.Parameter(value.to(DEVICE), requires_grad=False)
            transformer.get_submodule(owner)._parameters[key] = parameter
        transformer.blocks_to_swap = swap["blocks_to_swap"]
        transformer.offload_txt_emb = swap["offload_txt_emb"]
        for block in transformer.blocks[BLOCKS - swap["blocks_to_swap"] :]:
            block.to("cpu")
        if swap["offload_txt_emb"]:
            transformer.text_embedding.to("cpu")
        with torch.inference_mode():
            for _ in range(3):
                out = transformer(X.to(DEVICE)).cpu()
                if self.fails:
                    raise ValueError("in the middle")
        placement = distorch.report(transformer).placement if is_distributed(transformer) else {}
        if force_offload:
            transformer.to("cpu")
        return out, placement, transformer.moved


class Swap:
    RETURN_TYPES, FUNCTION = ("ARGS",), "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "blocks_to_swap": ("INT", {"max": BLOCKS}),
                "offload_img_emb": ("BOOLEAN", {}),
                "offload_txt_emb": ("BOOLEAN", {}),
            },
            "optional": {
                "vace_blocks_to_swap": ("INT", {"max": 15}),
                "use_non_blocking": ("BOOLEAN",),
            },
        }


offloads = []


def offload_transformer(transformer):
    """As in their sampler's module: more than moving."""
    offloads.append({p.device.type for p in transformer.parameters()})


@pytest.fixture
def wan(installed, accelerators):  # noqa: F811
    made = installed("ComfyUI-WanVideoWrapper", WanVideoSampler=Sampler, WanVideoBlockSwap=Swap)
    offloads.clear()

    def swap(device, **inputs):
        (found,) = run(
            made["WanVideoBlockSwapMultiGPU"], swap_device=device,
            **{"blocks_to_swap": 2, "offload_txt_emb": True, "offload_img_emb": False, **inputs},
        )  # fmt: skip
        return found

    def sample(model, force_offload=True):
        node = made["WanVideoSamplerMultiGPU"]
        return run(node, model=model, compute_device="sim:0", force_offload=force_offload)

    node = made["WanVideoBlockSwapMultiGPU"]
    return types.SimpleNamespace(swap=swap, sample=sample, node=node)


def model_of(swap, *, older=False):
    inner = Inner(block_swap_args=swap) if older else Inner()
    options = {} if older else {"block_swap_args": swap}
    return types.SimpleNamespace(model=inner, model_options={"transformer_options": options})


def expected():
    model = Transformer()
    model.load_state_dict(_values())
    with torch.inference_mode():
        return model(X)


@pytest.mark.parametrize("older", [False, True])
def test_what_they_put_aside_streams_from_the_donor(wan, older):
    swap = wan.swap("sim:1")
    model = model_of(swap, older=older)
    for _ in range(2):  # a second run finds the model as the first left it
        out, placement, moved = wan.sample(model)
        assert torch.equal(out, expected())
        assert moved == 0
        assert {placement[f"blocks.{i}.weight"] for i in (0, 1)} == {"sim:0"}
        assert {placement[f"blocks.{i}.weight"] for i in (2, 3)} == {"sim:1"}
        assert placement["text_embedding.weight"] == "sim:1"
        assert placement["head.weight"] == "sim:0"
        transformer = model.model.diffusion_model
        assert not is_distributed(transformer)
        assert {p.device.type for p in transformer.parameters()} == {"cpu"}
        assert not transformer._forward_pre_hooks
        assert (transformer.blocks_to_swap, transformer.offload_txt_emb) == (2, True)
    assert offloads == [{"cpu"}, {"cpu"}]
    assert swap["swap_device"] == "sim:1"


def test_weights_stay_where_they_were_if_they_are_to(wan):
    model = model_of(wan.swap("cpu"))
    for _ in range(2):
        out, placement, moved = wan.sample(model, force_offload=False)
        assert (moved, placement["blocks.3.weight"]) == (0, "cpu")
        assert torch.equal(out, expected())
        devices = {n: str(p.device) for n, p in model.model.diffusion_model.named_parameters()}
        assert devices["blocks.0.weight"] == devices["head.bias"] == DEVICE
        assert devices["blocks.3.weight"] == devices["text_embedding.weight"] == "cpu"
    assert offloads == []


def test_a_model_that_was_placed_by_a_spec_does_not_end_on_the_device(wan):
    model = model_of(wan.swap("cpu", spec="sim:0,0b;cpu,*"))
    wan.sample(model, force_offload=False)
    devices = {n: str(p.device) for n, p in model.model.diffusion_model.named_parameters()}
    assert {devices[f"blocks.{i}.weight"] for i in range(BLOCKS)} == {"cpu"}


def test_weights_that_are_shared_come_back_as_one(wan):
    from distorch.comfy.wan import _bring

    model = Transformer()
    model.blocks[1].weight = model.blocks[0].weight
    _bring(model, {"blocks.0.weight", "blocks.1.weight"}, DEVICE)
    assert model.blocks[1].weight is model.blocks[0].weight
    assert str(model.blocks[0].weight.device) == DEVICE
    assert model.head.weight.device.type == "cpu"


def test_a_swap_device_that_computes_keeps_all_blocks(wan):
    out, placement, moved = wan.sample(model_of(wan.swap("sim:0")))
    assert (set(placement.values()), moved) == ({DEVICE}, 0)
    assert torch.equal(out, expected())


def test_without_a_swap_device_their_way_is_theirs(wan):
    swap = wan.swap("sim:1")
    del swap["swap_device"]
    out, placement, moved = wan.sample(model_of(swap))
    assert (placement, moved) == ({}, 3 * 2 * 3)
    assert torch.equal(out, expected())


def test_an_error_leaves_a_plain_model(wan, monkeypatch):
    monkeypatch.setattr(Sampler, "fails", True)
    model = model_of(wan.swap("sim:1"))
    transformer = model.model.diffusion_model
    with pytest.raises(ValueError, match="in the middle"):
        wan.sample(model)
    assert not is_distributed(transformer)
    assert not transformer._forward_pre_hooks
    monkeypatch.setattr(Sampler, "fails", False)
    assert torch.equal(wan.sample(model)[0], expected())


def test_a_spec_places_the_whole_model(wan):
    swap = wan.swap("cpu", spec="sim:0,30kb;sim:1,30kb;cpu,*", blocks_to_swap=0)
    out, placement, moved = wan.sample(model_of(swap))
    assert torch.equal(out, expected())
    assert moved == 0
    assert set(placement.values()) == {"sim:0", "sim:1", "cpu"}


def test_a_ratio_and_the_strings_of_old(wan):
    for spec in ("sim:0,50%;cpu,50%", "cpu,*", "sim:1,5gb*", "cpu,0.5"):
        out, placement, moved = wan.sample(model_of(wan.swap("sim:1", spec=spec)))
        assert torch.equal(out, expected()), spec
        assert moved == 0
        assert {"cpu", "sim:1"} & set(placement.values())


def test_with_a_spec_their_loading_puts_all_aside(wan):
    swap = wan.swap("cpu", spec="cpu,*", blocks_to_swap=1, offload_txt_emb=False)
    assert swap["blocks_to_swap"] == BLOCKS  # the most that their input takes
    assert swap["offload_txt_emb"] and swap["offload_img_emb"]
    assert swap["vace_blocks_to_swap"] == 15
    assert "use_non_blocking" not in swap  # as they were given


def test_a_wrong_spec_is_an_error_on_the_node(wan):
    node = wan.node
    assert "no 'sim:9'" in node.VALIDATE_INPUTS(spec="sim:9,1gb;cpu,*")
    assert "unknown unit" in node.VALIDATE_INPUTS(spec="cpu,2qb")
    assert node.VALIDATE_INPUTS(spec="") is True
    with pytest.raises(SpecError, match="unknown unit"):
        wan.swap("cpu", spec="cpu,2qb")


def test_the_inputs_of_the_block_swap(wan):
    optional = wan.node.INPUT_TYPES()["optional"]
    assert list(optional)[-2:] == ["swap_device", "spec"]
    assert optional["spec"][1]["default"] == ""
