# SPDX-License-Identifier: Apache-2.0
"""Nodes that keep parts of a model, in front of one that makes a copy of it."""

import functools
import types

import pytest
import torch

from distorch.errors import PlacementError
from tests.comfy.test_patcher import X, output

UP = "diffusion_model.0.up.forward"


def own_copy(patcher):
    from distorch.comfy import outputs
    from distorch.comfy.placement import Placement

    return outputs.own_copy(patcher, Placement("cpu,100kb;disk,*", "cpu"))


@pytest.fixture
def stock(host):
    import comfy.sd

    return comfy.sd.patcher()


def doubled(self, x, factor=2.0):
    return factor * torch.nn.functional.linear(x, self.weight, self.bias)


def bound_method(patcher):
    layer = patcher.model.diffusion_model[0].up
    patcher.add_object_patch(UP, types.MethodType(doubled, layer))


def bound_part(patcher):
    layer = patcher.model.diffusion_model[0].up
    patcher.add_object_patch(UP, functools.partial(types.MethodType(doubled, layer), factor=2.0))


@pytest.mark.parametrize("bind", [bound_method, bound_part])
def test_a_bound_method_goes_to_the_same_part_of_the_copy(host, stock, bind):
    bind(stock)
    wanted = output(host, stock)
    made = own_copy(stock)
    with torch.inference_mode():
        stock.model.diffusion_model[0].up.weight.zero_()  # must not be what the copy computes with
    assert torch.equal(output(host, made), wanted)
    patch = made.object_patches[UP]
    method = patch if isinstance(patch, types.MethodType) else patch.func
    assert method.__self__ is made.model.diffusion_model[0].up
    given = stock.object_patches[UP]
    assert getattr(given, "func", given).__self__ is stock.model.diffusion_model[0].up


class Hook:
    def __init__(self, layer):
        self.layer = layer


def closure(patcher):
    """As nodes that cache steps do: a function among the options that remembers a block."""
    block = patcher.model.diffusion_model
    seen = {"calls": 0}

    def forward(x, again=0):
        seen["calls"] += 1
        assert forward is not None  # it remembers itself
        return block[0](x) * 2.0

    patcher.model_options["model_function_wrapper"] = forward
    patcher.model_options["transformer_options"]["patches"] = {"a": [forward]}


def test_a_function_that_remembers_a_part_remembers_that_of_the_copy(host, stock):
    closure(stock)
    given = stock.model_options["model_function_wrapper"]
    made = own_copy(stock)
    host.load_models_gpu([made])
    function = made.model_options["model_function_wrapper"]
    assert made.model_options["transformer_options"]["patches"]["a"][0] is function is not given
    with torch.inference_mode():
        wanted = stock.model.diffusion_model[0](X) * 2.0
        stock.model.diffusion_model[0].up.weight.zero_()
        assert torch.equal(function(X), wanted)
        assert not torch.equal(given(X), wanted)


def test_methods_and_hooks_on_a_layer_are_put_on_the_same_layer(host, stock):
    import comfy.sd

    layer = stock.model.diffusion_model[0].up
    layer.forward = types.MethodType(doubled, layer)
    layer.register_forward_hook(lambda module, args, output: output + module.bias.sum())
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 1.5,), kwargs), with_kwargs=True
    )
    stock.cached_patcher_init = (lambda disable_dynamic=False: comfy.sd.patcher(), ())
    wanted = output(host, stock)
    made = own_copy(stock)  # read again from the file
    assert torch.equal(output(host, made), wanted)
    assert made.model.diffusion_model[0].up.forward.__self__ is made.model.diffusion_model[0].up


def compiled_block(patcher):
    block = patcher.model.diffusion_model[1]
    patcher.add_object_patch("diffusion_model.1", torch.nn.Sequential(block))


def injected(patcher):
    hooks = [Hook(patcher.model.diffusion_model[1].up)]
    patcher.injections = {"bypass": [types.SimpleNamespace(inject=lambda model: hooks)]}


def wrapped(patcher):
    kept = {"diffusion_model": torch.nn.Sequential(patcher.model.diffusion_model)}

    def wrapper(executor, *args, compiled=kept):
        return compiled

    patcher.add_wrapper_with_key("apply_model", "compile", wrapper)


def deep(patcher):
    """Found by a long way first, and by a short one."""
    hook = Hook(patcher.model.diffusion_model[1].up)
    kept = {"hook": hook}
    long = [kept]
    for _ in range(30):
        long = [long]
    patcher.model_options["transformer_options"]["a"] = [long, kept]


def test_layers_that_the_file_does_not_have_are_refused(stock):
    import comfy.sd

    stock.cached_patcher_init = (lambda disable_dynamic=False: comfy.sd.patcher(), ())
    stock.model.diffusion_model[0].adapter = torch.nn.Linear(64, 64)
    with pytest.raises(PlacementError, match=r"'diffusion_model\.0\.adapter' is not in the file"):
        own_copy(stock)


def test_a_list_that_holds_itself(host, stock):
    block = stock.model.diffusion_model[0]
    kept = [lambda: block]
    kept.append(kept)
    stock.model_options["transformer_options"]["a"] = kept
    found = own_copy(stock)
    made = found.model_options["transformer_options"]["a"]
    assert made[1] is made is not kept
    assert made[0]() is found.model.diffusion_model[0]


@pytest.mark.parametrize("bind", [compiled_block, injected, wrapped, deep])
def test_what_cannot_be_made_anew_is_refused(stock, bind):
    bind(stock)
    with pytest.raises(PlacementError, match="so that it comes after this one"):
        own_copy(stock)


def test_copies_for_other_gpus_are_made_behind_it(stock):
    import comfy.sd
    from comfy import model_patcher

    stock.additional_models = {"multigpu": [comfy.sd.patcher()]}
    assert own_copy(stock).clone_base_uuid != stock.clone_base_uuid
    stock.additional_models = {
        "multigpu": [comfy.sd.dynamic_patcher(model_patcher.ModelPatcherDynamic)]
    }
    with pytest.raises(PlacementError, match="copies of the model for other GPUs"):
        own_copy(stock)


def test_what_gets_the_model_when_it_runs_goes_with_it(host, stock):
    sampling = torch.nn.Module()
    scale = torch.ones(1)
    stock.add_object_patch("model_sampling", sampling)
    stock.add_wrapper_with_key("apply_model", "a", lambda executor, *args: executor(*args) * scale)
    stock.callbacks = {"on_load": [lambda *args: (sampling, stock)]}
    stock.injections = {"a": [types.SimpleNamespace(inject=lambda model: model.model)]}
    stock.model.model_sampling = None
    with torch.inference_mode():
        wanted = stock.model(X)
    assert torch.equal(output(host, own_copy(stock)), wanted)
