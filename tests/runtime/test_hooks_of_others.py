# SPDX-License-Identifier: Apache-2.0
"""What others do with modules and tensors: functional transforms, profilers, parametrizations."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import distorch

ON_DISK = "cpu,0b;disk,*"
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


@pytest.fixture
def pair():
    plain = net()
    return plain, distorch.distribute(copy.deepcopy(plain), ON_DISK, min_bytes=0)


def both(pair, function):
    """The function's tensors for the plain and the distributed module must be the same."""
    wanted, got = (torch.utils._pytree.tree_leaves(function(module)) for module in pair)
    assert len(wanted) == len(got) > 0
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def parameters_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def loss(module, parameters, x):
    return functional_call(module, parameters, (x,)).square().sum()


TRANSFORMS = {
    "vmap": lambda m: torch.vmap(m)(X),
    "grad": lambda m: torch.func.grad(lambda p: loss(m, p, X))(parameters_of(m)),
    "per-sample grad": lambda m: torch.vmap(
        torch.func.grad(lambda p, x: loss(m, p, x[None])), in_dims=(None, 0)
    )(parameters_of(m), X),
    "jvp": lambda m: torch.func.jvp(
        lambda p: loss(m, p, X),
        (parameters_of(m),),
        ({name: torch.ones(p.shape) for name, p in m.named_parameters()},),
    ),
    "jacrev": lambda m: torch.func.jacrev(m)(X),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x).square().sum())(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_transforms(pair, name):
    both(pair, TRANSFORMS[name])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    plain = nn.Linear(8, 4)
    model = distorch.distribute(copy.deepcopy(plain), ON_DISK, min_bytes=0)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=layout)
    both((plain, model), lambda m: list(m(x).unbind()))


def test_sparse_activations():
    table = torch.randn(4, 3)
    adjacency = torch.eye(4).to_sparse()
    results = []
    for weight in (table.clone(), distorch.shard(table, "disk")):
        weight.requires_grad_()
        result = torch.sparse.mm(adjacency, weight)
        result.sum().backward()
        results += [result, weight.grad]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_flop_counter(pair):
    counts = []
    for module in pair:
        with FlopCounterMode(display=False) as counter:
            module(X).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def can_show_addresses(model):
    try:
        with distorch.profiling(model):
            return True
    except NotImplementedError:
        return False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"record_shapes": True, "with_flops": True},
        {"with_stack": True},
        {"profile_memory": True},
    ],
)
def test_profiler(pair, options, capfd):
    _, model = pair
    if options and not can_show_addresses(model):
        pytest.skip("this torch cannot profile tensors without memory")
    context = distorch.profiling(model) if options else contextlib.nullcontext()
    with context, profile(activities=[ProfilerActivity.CPU], **options) as result:
        model(X).sum().backward()
    keys = {event.key for event in result.key_averages()}
    assert {"aten::linear", "distorch::fetch 0.weight", "distorch::fetch 3.weight"} <= keys
    assert "Exception" not in capfd.readouterr().err
    if "record_shapes" in options:
        shapes = [event.input_shapes for event in result.events() if event.name == "aten::linear"]
        assert [[5, 8], [16, 8], [16]] in shapes
    with pytest.raises(RuntimeError, match=r"distorch\.materialize"):
        model[0].weight.untyped_storage().data_ptr()


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrization(pair, when):
    plain, _ = pair
    model = net()
    if when == "after":
        distorch.distribute(model, ON_DISK, min_bytes=0)
    for module in (plain, model):
        parametrize.register_parametrization(module[0], "weight", Double())
    if when == "before":
        distorch.distribute(model, ON_DISK, min_bytes=0)
    assert distorch.is_sharded(model[0].parametrizations.weight.original)
    both((plain, model), lambda m: m(X))
    for module in (plain, model):
        parametrize.remove_parametrizations(module[0], "weight")
    both((plain, model), lambda m: m(X))


NORMS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NORMS)
def test_normalised_weights(name, when):
    modules = []
    for distributed in (False, True):
        module = net()
        if distributed and when == "after":
            distorch.distribute(module, ON_DISK, min_bytes=0)
        torch.manual_seed(1)
        NORMS[name](module[0])
        if distributed and when == "before":
            distorch.distribute(module, ON_DISK, min_bytes=0)
        modules.append(module)

    def step(module):
        module.zero_grad()
        module(X).square().sum().backward()
        return [module(X), *(p.grad for p in module.parameters())]

    both(modules, step)


def test_modes_see_the_operators(pair):
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    for module in pair:
        with Seen() as mode:
            module(X)
        seen.append(mode.names)
    assert seen[0] == seen[1]


def test_averages_of_weights(pair):
    def averaged(module):
        model = torch.optim.swa_utils.AveragedModel(module)
        model.update_parameters(module)
        return model(X)

    both(pair, averaged)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(pair, process_group):
    def step(module):
        parallel = nn.parallel.DistributedDataParallel(module)
        result = parallel(X)
        result.square().sum().backward()
        return [result, *(p.grad for p in module.parameters())]

    both(pair, step)
    assert distorch.report(pair[1]).ok


def test_hooks_of_accelerate(pair):
    from accelerate import Accelerator, cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubled(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2,), kwargs

    def hooked(module):
        add_hook_to_module(module[0], Doubled())
        found = [module(X)]
        remove_hook_from_module(module[0])
        return [*found, module(X)]

    def trained(module):
        accelerator = Accelerator(cpu=True)
        module, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(module(X).square().mean())
            accelerator.backward(losses[-1])
            optimizer.step()
        return losses

    both(pair, hooked)
    both(pair, trained)
    plain, model = pair
    assert torch.equal(cpu_offload(model, execution_device=torch.device("cpu"))(X), plain(X))


def test_hooks_of_diffusers(pair):
    from diffusers.hooks import HookRegistry, ModelHook, apply_layerwise_casting

    class Tripled(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs) * 3

    def hooked(module):
        registry = HookRegistry.check_if_exists_or_initialize(module[3])
        registry.register_hook(Tripled(), "tripled")
        found = [module(X)]
        registry.remove_hook("tripled")
        return [*found, module(X)]

    def cast(module):
        apply_layerwise_casting(
            module, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        with torch.no_grad():
            return module(X)

    both(pair, hooked)
    both(pair, cast)
