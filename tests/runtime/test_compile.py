# SPDX-License-Identifier: Apache-2.0
"""torch.compile on a distributed model: one graph, the bits of the compiled resident one."""

import copy
import gc
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import distorch

ON_DISK = "cpu,0b;disk,*"
FETCH = r"(buf\d+) = torch\.ops\.distorch\.fetch\.default\("


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Every kind of weight: a table that is tied to the head, a convolution, 1-D ones."""

    def __init__(self, blocks=3, width=64):
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 50)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def pair(spec=ON_DISK, **options):
    torch.manual_seed(0)
    plain = Model(**options)
    return plain, distorch.distribute(copy.deepcopy(plain), spec, min_bytes=0)


def tokens(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


def assert_same_gradients(model, plain):
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("min_bytes", [0, "auto"])
def test_one_graph_for_every_placement(min_bytes):
    plain, model = pair()
    distorch.redistribute(model, "disk,*", min_bytes=min_bytes)
    compiled, expected = torch.compile(model, fullgraph=True), torch.compile(plain, fullgraph=True)
    x = tokens(2, 16)
    with torch.no_grad():
        wanted = expected(x)
        assert torch.equal(compiled(x), wanted)
    expected(x).square().sum().backward()
    compiled(x).square().sum().backward()
    assert_same_gradients(model, plain)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for spec in ("cpu,30%;disk,70%", "cpu,*", "cpu,50%;disk,*"):
            distorch.redistribute(model, spec)
            report = distorch.report(model)
            assert report.ok, report.problems
            with torch.no_grad():
                assert torch.equal(compiled(x), wanted)
            model.zero_grad()
            compiled(x).square().sum().backward()
            assert_same_gradients(model, plain)
    distorch.undistribute(model)
    assert type(model.head) is nn.Linear
    assert torch.equal(compiled(x), wanted)


def test_autocast_and_optimizer():
    plain, model = pair()
    losses = {}
    for name, module in (("plain", plain), ("model", model)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        compiled, losses[name] = torch.compile(module, fullgraph=True), []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = compiled(tokens(2, 16)).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["model"] == losses["plain"]
    assert len(set(losses["plain"])) == 4


def test_dynamic_shapes():
    plain, model = pair()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    expected = torch.compile(plain, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (8, 13, 21):
            assert torch.equal(compiled(tokens(3, length)), expected(tokens(3, length)))


def test_regional_compilation_of_a_mixed_placement():
    plain, model = pair("cpu,40%;disk,60%", blocks=6)
    assert {distorch.is_sharded(block.up.weight) for block in model.blocks} == {True, False}
    count = CompileCounterWithBackend("inductor")
    for block in model.blocks:
        block.compile(backend=count, fullgraph=True)
    for block in plain.blocks:
        block.compile(fullgraph=True)
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 16)), plain(tokens(2, 16)))
    assert count.frame_count == 1


def most_alive(code):
    """How many fetched weights generated code holds at once, and how many fetches it has."""
    owner, holders, most, fetches = {}, {}, 0, 0
    for line in code.splitlines():
        if found := re.match(rf"\s*{FETCH}", line):
            fetches += 1
            owner[found[1]] = found[1]
            holders[found[1]] = {found[1]}
        elif (found := re.match(r"\s*(buf\d+) = (buf\d+)$", line)) and found[2] in owner:
            owner[found[1]] = owner[found[2]]
            holders[owner[found[1]]].add(found[1])
        for name in re.findall(r"\bdel (buf\d+)", line):
            if name in owner:
                holders[owner[name]].discard(name)
        most = max(most, sum(1 for held in holders.values() if held))
    return most, fetches


def test_graphs_hold_few_weights():
    _, model = pair(blocks=12)
    compiled = torch.compile(model, fullgraph=True)

    def step():
        compiled(tokens(2, 16)).sum().backward()

    _, codes = run_and_get_code(step)
    (forward, fetched), (backward, again) = map(most_alive, codes)
    assert fetched >= 12 * 6
    assert again >= 12 * 3  # not kept from the forward pass
    assert max(forward, backward) <= 6


def test_generated_code_leaves_donors_alone():
    # The result has the size of the weight: its memory would be there to be used again.
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, (self.weight + 1).relu() * 2)

    module = distorch.distribute(Scaled(64, 64), "cpu,*", min_bytes=0)
    before = distorch.materialize(module.weight)
    with torch.no_grad():
        for _ in range(2):
            torch.compile(module, fullgraph=True)(torch.randn(4, 64))
    assert torch.equal(distorch.materialize(module.weight), before)


def test_functions_that_inductor_runs_in_place():
    class Patched(nn.Linear):
        def forward(self, x):
            rows = torch.arange(4)
            return nn.functional.linear(x, self.weight.index_put((rows,), torch.ones(8, 8)[rows]))

    module = distorch.distribute(Patched(8, 8), "cpu,*", min_bytes=0)
    before, x = distorch.materialize(module.weight), torch.randn(2, 8)
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(torch.compile(module, fullgraph=True)(x), wanted)
    assert distorch.is_sharded(module.weight)
    assert torch.equal(distorch.materialize(module.weight), before)


@torch.library.custom_op("distorch_tests::double", mutates_args=("weight",))
def double(weight: torch.Tensor) -> None:
    weight.mul_(2)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize(
    "write", [lambda w: w.mul_(2), lambda w: w.t().__setitem__(0, 3.0), double]
)
def test_writes_are_refused(write, backend):
    class Written(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                write(self.weight)
            return super().forward(x)

    module = distorch.distribute(Written(8, 8), ON_DISK, min_bytes=0)
    before = distorch.materialize(module.weight)
    said = {
        "inductor": "writes to a sharded weight.*keep the weight resident",
        "aot_eager": "cannot mutate tensors with frozen storage",  # PyTorch's own words
    }
    with pytest.raises(Exception, match=said[backend]):
        torch.compile(module, backend=backend)(torch.randn(2, 8))
    assert torch.equal(distorch.materialize(module.weight), before)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize(
    "read",
    [
        lambda w, x: x @ w.transpose(0, 1).transpose_(0, 1),
        lambda w, x: x @ w.unsqueeze(0).squeeze_(0),
        lambda w, x: torch.func.grad(lambda t: (t @ w).sum())(x),
        lambda w, x: torch.func.jvp(lambda t: t @ w, (x,), (torch.ones_like(x),))[1],
    ],
)
def test_code_that_only_reads_is_compiled(read, backend):
    class Reads(nn.Linear):
        def forward(self, x):
            return read(self.weight, x)

    plain = Reads(8, 8)
    module = distorch.distribute(copy.deepcopy(plain), ON_DISK, min_bytes=0)
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend=backend)(x), plain(x))


def test_functionalized_by_the_user():
    class Functional(nn.Linear):
        def forward(self, x):
            return torch.func.functionalize(lambda t: nn.functional.linear(t, self.weight))(x)

    plain = Functional(8, 8, bias=False)
    module = distorch.distribute(copy.deepcopy(plain), ON_DISK, min_bytes=0)
    x = torch.randn(2, 8)
    assert torch.equal(torch.compile(module, backend="eager")(x), plain(x))


def test_copies_and_pickles_are_plain_classes():
    _, model = pair()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = tokens(2, 8)
    wanted = compiled(x)
    assert type(model.head) is not nn.Linear
    assert isinstance(model.head, nn.Linear)
    assert repr(model) == repr(Model())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.head) is nn.Linear
        assert torch.equal(copied(x), wanted)
    del model.head.weight
    model.head.weight = torch.zeros(50, 64)  # as weight_norm does it
    assert torch.equal(model(x), model.head.bias.expand(2, 8, 50))
    torch._dynamo.reset()
    copied = copy.deepcopy(pair()[1])
    assert torch.equal(torch.compile(copied, backend="aot_eager", fullgraph=True)(x), wanted)


def test_the_fast_path_of_encoder_layers():
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    model = distorch.distribute(copy.deepcopy(plain), ON_DISK, min_bytes=0)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        result, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert torch.equal(result, torch.compile(plain, fullgraph=True)(x))
    assert "_transformer_encoder_layer_fwd" in code[0]


def test_export(tmp_path):
    plain, model = pair()
    x = tokens(2, 16)
    exported = torch.export.export(model, (x,), strict=False)
    assert torch.equal(exported.module()(x), plain(x))
    with pytest.raises(RuntimeError, match=r"undistribute\(model\) first"):
        torch.export.save(exported, tmp_path / "m.pt2")


def test_passes_of_others_stay():
    seen = []
    with torch._inductor.config.patch(joint_custom_pre_pass=seen.append):
        _, model = pair()
        with torch.no_grad():
            torch.compile(model)(tokens(2, 16))
    assert seen


def test_dynamo_is_not_imported_before_it_is_needed():
    program = (
        "import sys, torch, distorch; from torch import nn\n"
        "module = distorch.distribute(nn.Embedding(50, 8), 'cpu,*', min_bytes=0)\n"
        "module(torch.zeros(2, dtype=torch.long))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "torch.compile(module, backend='eager', fullgraph=True)(torch.zeros(2, dtype=torch.long))\n"
        "assert type(module) is not nn.Embedding\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_loras_change_below_a_graph(tmp_path, mode):
    plain = Model()
    save_file(
        {k: v for k, v in plain.state_dict().items() if k != "head.weight"},
        tmp_path / "m.safetensors",
    )
    lora = {
        f"blocks.{i}.up.lora_{side}.weight": torch.randn(shape)
        for i in range(3)
        for side, shape in (("A", (4, 64)), ("B", (128, 4)))
    }

    def loaded(spec, strength):
        loras = [(lora, strength)] if strength else []
        options = {"min_bytes": 0, "loras": loras, "lora_mode": mode}
        return distorch.load(Model(), tmp_path / "m.safetensors", spec, **options)

    model = loaded("cpu,40%;disk,*", 0.5)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), tokens(2, 16)
    with torch.no_grad():
        for strength in (0.5, 0.9, 0, 0.2):
            distorch.set_loras(model, [(lora, strength)] if strength else [])
            assert torch.equal(compiled(x), distorch.undistribute(loaded("cpu,*", strength))(x))
            assert distorch.report(model).ok


def test_cuda_graphs_are_cut_at_fetches():
    """What Inductor asks of an operator before it captures it (tests/gpu has it do so)."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.distorch.fetch.default.tags
