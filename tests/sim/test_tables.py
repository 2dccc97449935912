# SPDX-License-Identifier: Apache-2.0
"""A table that is larger than the ring is not brought: only the rows that are looked up are."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.testing import sim

WORDS, WIDTH = 4096, 64  # a table of 1 MiB


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.layers(self.table(ids))


def placed(spec, prefetch="64kb", **options):
    model = Model(**options)
    ids = torch.tensor([[5, 4095, 5, 0]])
    wanted = model(ids)
    distorch.distribute(model, spec, min_bytes=0, prefetch=prefetch)
    return model, ids.to("sim:0" if "sim:0" in spec else "cpu"), wanted


@pytest.fixture
def _linked():
    sim.configure(devices=2, links={("sim:1", "sim:0"): (50e9, 5e-6)})


@pytest.mark.parametrize(
    "spec", ["sim:0,0b;cpu,*", "sim:0,0b;disk,*", "sim:0,0b;sim:1,*", "sim:0,0b;cpu+sim:1,*",
             "cpu,0b;disk,*"],
)  # fmt: skip
@pytest.mark.usefixtures("_linked")
def test_rows_alone_travel(spec):
    model, ids, wanted = placed(spec)
    distorch.reset_stats(model)
    assert torch.equal(model(ids).cpu(), wanted)
    layers = sum(p.numel() * 4 for p in model.layers.parameters())
    assert (
        sum(distorch.stats(model).bytes.values()) == 3 * WIDTH * 4 + layers
    )  # one number is there twice
    assert torch.equal(model.table.weight.detach().cpu()[7], model.table.weight[7].cpu())


def test_many_rows_bring_the_table():
    model, _, _ = placed("sim:0,0b;cpu,*")
    ids = torch.arange(WORDS // 4)
    wanted = distorch.materialize(model.table.weight).cpu()[: WORDS // 4]
    distorch.reset_stats(model)
    assert torch.equal(model.table(ids.to("sim:0")).cpu(), wanted)
    assert distorch.stats(model).bytes == {"cpu->sim:0": WORDS * WIDTH * 4}


def test_a_table_that_the_ring_holds_is_brought_once():
    model, ids, wanted = placed("sim:0,0b;cpu,*", prefetch="8mb")
    for _ in range(2):
        assert torch.equal(model(ids).cpu(), wanted)
    distorch.reset_stats(model)
    assert torch.equal(model(ids).cpu(), wanted)
    assert distorch.stats(model).bytes.get("cpu->sim:0", 0) == 0


def test_the_cpu_uses_a_table_in_ram_where_it_is():
    model, ids, wanted = placed("cpu,2mb;disk,*")
    distorch.redistribute(model, "cpu,*")
    distorch.reset_stats(model)
    assert torch.equal(model(ids), wanted)
    assert distorch.stats(model).bytes == {}


def test_the_ring_has_no_room_for_tables():
    """A tied one is used whole by the head: there is room for it."""

    class Large(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.table = nn.Embedding(300_000, 256)  # 293 MiB
            self.up = nn.Linear(256, 256)
            self.head = nn.Linear(256, 300_000, bias=False) if tied else None
            if tied:
                self.head.weight = self.table.weight

    def ring(tied):
        with torch.device("meta"):
            model = Large(tied)
        plan = distorch.plan(model, "sim:0,0b;cpu,*", min_bytes=0)
        from distorch.runtime.groups import group_members
        from distorch.runtime.options import Options
        from distorch.runtime.ring_room import ring_bytes

        return ring_bytes(group_members(model), plan, Options())

    assert ring(tied=False) == 256 * 256 * 4 + 256 * 4 + 4 * 4096
    assert ring(tied=True) > 256 << 20


def test_gradients_and_writes():
    model, ids, _ = placed("sim:0,0b;cpu,*")
    plain = Model()
    plain.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    for module, numbers in ((model, ids), (plain, ids.cpu())):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            module(numbers).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.table.weight.grad.cpu(), plain.table.weight.grad)
    assert torch.equal(model(ids).cpu(), plain(ids.cpu()))
    with torch.no_grad():
        model.table.weight[5] = 1.0
    assert torch.equal(model.table(ids).cpu()[0, 0], torch.ones(WIDTH))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32], ids=str)
def test_only_indices_are_taken(dtype):
    """As an embedding of PyTorch takes them."""
    model, ids, _ = placed("cpu,0b;disk,*")
    ids = ids.clamp(max=9).to(dtype)
    plain = nn.Embedding(WORDS, WIDTH)
    plain.weight = nn.Parameter(distorch.materialize(model.table.weight))
    try:
        wanted = plain(ids)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as caught:
            model.table(ids)
        assert str(caught.value)[:60] == str(error)[:60]
    else:
        assert torch.equal(model.table(ids), wanted)


def test_a_row_that_cannot_be_read_names_the_weight(tmp_path):
    file = tmp_path / "m.safetensors"
    save_file(Model().state_dict(), file)
    model = distorch.load(Model(), file, "cpu,0b;disk,*", min_bytes=0, prefetch="64kb")
    file.write_bytes(file.read_bytes()[: -(WORDS * WIDTH * 4)])
    with pytest.raises(distorch.FetchError, match=r"weight 'table.weight' \(1048576 bytes\) could"):
        for number in range(WORDS):
            model.table(torch.tensor([number]))


def test_a_lookup_is_in_the_statistics_and_in_a_trace(tmp_path):
    model, ids, _ = placed("sim:0,0b;cpu,*")
    distorch.reset_stats(model)
    with distorch.trace(model, tmp_path / "t.json"):
        model.table(ids)
    assert distorch.stats(model).stall_seconds > 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["name"] == "table.weight"]
    assert [e["args"]["bytes"] for e in spans] == [3 * WIDTH * 4]


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 5}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}],
)
def test_options_of_an_embedding(options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(WORDS, WIDTH, **options))
    model = copy.deepcopy(plain)
    distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0, prefetch="64kb")
    ids = torch.tensor([[5, 4095, 5, 0]])
    for module in (plain, model):
        module(ids).square().sum().backward()
    assert torch.equal(model(ids), plain(ids))
    gradients = [module[0].weight.grad for module in (plain, model)]
    found, wanted = (g.to_dense() if g.is_sparse else g for g in gradients)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("ids", [[WORDS], [-1], []], ids=str)
def test_numbers_of_rows(ids):
    model, _, _ = placed("cpu,0b;disk,*")
    numbers = torch.tensor(ids, dtype=torch.long)
    if ids:
        with pytest.raises(IndexError, match=str(ids[0])):
            model.table(numbers)
    else:
        assert model.table(numbers).shape == (0, WIDTH)


def test_a_view_of_a_table_is_brought():
    model, ids, _ = placed("sim:0,0b;cpu,*")
    whole = distorch.materialize(model.table.weight).cpu()
    ids = ids.clamp(max=10)
    found = nn.functional.embedding(ids, model.table.weight[1:])
    assert torch.equal(found.cpu(), whole[1:][ids.cpu()])
