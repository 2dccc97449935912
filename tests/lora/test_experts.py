# SPDX-License-Identifier: Apache-2.0
"""LoRAs on parameters that are no layer's weight: PEFT's target_parameters, experts one by one."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch.errors import FormatError

EXPERTS, WIDE, HIDDEN = 3, 12, 8
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MODES = ["merge", "fetch", "background"]


class Experts(nn.Module):
    """A stack of gated layers, [experts, outputs, inputs] or turned over."""

    def __init__(self, is_transposed=False, hidden=HIDDEN, wide=WIDE):
        super().__init__()
        self.is_transposed, self.is_concatenated = is_transposed, True
        up, down = (2 * wide, hidden), (hidden, wide)
        if is_transposed:
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *up))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *down))

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        gate, value = (x @ up).chunk(2, dim=-1)
        return ((gate.sigmoid() * value) @ down).mean(0)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, HIDDEN))

    def forward(self, x):
        return x @ self.table.T @ self.table


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.router = Router()
        self.experts = Experts(**options)

    def forward(self, x):
        return self.experts(self.router(self.proj(x)))


pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")


def adapter(folder, net, **config):
    """PEFT's own adapter with random factors, saved; and its weights merged."""
    config = {"target_modules": [], "r": 2, "lora_alpha": 3, "init_lora_weights": False} | config
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(net), LoraConfig(**config))
    adapted.save_pretrained(folder)
    return dict(adapted.merge_and_unload().named_parameters())


def distributed(net, dtype=torch.float32):
    options = {"min_bytes": 0, "compute": "cpu"}
    return distorch.distribute(copy.deepcopy(net).to(dtype), "cpu,0b;disk,*", **options)


def patched(net, loras, mode="merge"):
    model = distributed(net)
    distorch.set_loras(model, loras, lora_mode=mode)
    distorch.finish_merging(model)
    return model


def values(model):
    return {name: distorch.materialize(p).detach() for name, p in model.named_parameters()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], ["router.table", *BOTH]], ids=len)
def test_as_peft_merges_them(tmp_path, targets, is_transposed, mode):
    net = Net(is_transposed=is_transposed)
    wanted = adapter(
        tmp_path, net, target_parameters=targets, target_modules=["proj"],
        rank_pattern={"experts.down_proj": 1}, alpha_pattern={"table": 7},
    )  # fmt: skip
    model = patched(net, [(tmp_path, 1.0)], mode)
    assert_same(values(model), wanted)
    x = torch.randn(5, HIDDEN)
    plain = copy.deepcopy(net)
    plain.load_state_dict(wanted)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    distorch.set_loras(model, [])
    assert all(torch.equal(value, net.get_parameter(name)) for name, value in values(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_in_every_mode_and_rounded_once(tmp_path, dtype):
    net = Net().to(dtype)
    adapter(tmp_path, net.float(), target_parameters=BOTH, use_rslora=True)
    net = net.to(dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.experts.base_layer.lora_{f}.weight"].double() for f in "AB")
    delta = torch.einsum("ore,eri->eoi", b.view(-1, 2, EXPERTS), a.view(EXPERTS, 2, -1))
    exact = net.experts.gate_up_proj.double() - 0.6 * 3 / 2**0.5 * delta
    found = [values(patched(net, [(tmp_path, -0.6)], mode)) for mode in MODES]
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    torch.testing.assert_close(
        found[0]["experts.gate_up_proj"].double(), exact.to(dtype).double(),
        rtol=torch.finfo(dtype).eps * 2, atol=1e-5,
    )  # fmt: skip


def test_two_adapters_and_a_load(tmp_path):
    net = Net()
    first = adapter(tmp_path / "one", net, target_parameters=BOTH)
    torch.manual_seed(5)
    second = adapter(tmp_path / "two", net, target_parameters=BOTH[1:], r=1)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    for mode in MODES:
        model = distorch.load(
            Net(), tmp_path / "base.safetensors", "cpu,0b;disk,*", min_bytes=0, compute="cpu",
            loras=[(tmp_path / "one", 0.5), (tmp_path / "two", 2.0)], lora_mode=mode,
        )  # fmt: skip
        base = dict(net.named_parameters())
        wanted = {
            name: base[name] + 0.5 * (first[name] - base[name]) + 2 * (second[name] - base[name])
            for name in base
        }
        assert_same(values(model), wanted)


@pytest.mark.parametrize(
    "scale", [torch.tensor(1.5), torch.tensor([0.5, 1.0, 2.0])], ids=["one", "many"]
)
def test_a_narrow_stack_with_one_scale_and_with_many(tmp_path, scale):
    """With several scales the kernel's matrix cannot be another one: numbers are decoded first."""
    net = Net()
    name = "experts.gate_up_proj"
    state = {key: value.detach() for key, value in net.state_dict().items()}
    state[name] = state[name].to(torch.float8_e4m3fn)
    state[f"{name}.weight_scale"] = scale
    save_file(state, tmp_path / "base.safetensors")
    net.experts.gate_up_proj.data = state[name].float() * scale.view(-1, 1, 1)
    wanted = adapter(tmp_path, net, target_parameters=BOTH[:1])
    found = []
    for mode in MODES:
        model = distorch.load(
            Net(), tmp_path / "base.safetensors", "cpu,0b;disk,*", min_bytes=0, compute="cpu",
            loras=[(tmp_path, 1.0)], lora_mode=mode, dtype="float32",
        )  # fmt: skip
        assert_same({name: values(model)[name]}, {name: wanted[name]})
        found.append(values(model)[name])
        distorch.set_loras(model, [])
        assert torch.equal(values(model)[name], net.experts.gate_up_proj)
    assert all(torch.equal(found[0], other) for other in found[1:])


# Older versions: which dimension is "in", of a stack and of one that is turned over.
VERSIONS = {
    None: ("second", "second"), "0.18.1": ("second", "second"), "0.19.0": ("second", "third"),
    "0.19.1": ("third", "second"), "0.21.2": ("third", "second"), "0.22.0.dev0": ("third", "second"),
}  # fmt: skip


def stacked(way, up, down):
    """What the factors of a stack add, by the way in which a version of PEFT reads them."""
    a = down.reshape(EXPERTS, -1, down.shape[1])
    b = up.reshape(up.shape[0], -1, EXPERTS)
    return torch.einsum("ore,eri->eoi" if way == "third" else "ore,eri->eio", b, a)


def written_by(folder, version, down, up):
    """An adapter for experts.down_proj alone."""
    folder.mkdir(exist_ok=True)
    stem = "base_model.model.experts"
    save_file(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": BOTH[1:]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
    return folder


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_versions_of_peft_on_square_experts(tmp_path, version, is_transposed):
    net = Net(is_transposed=is_transposed, wide=HIDDEN)
    down, up = torch.randn(2 * EXPERTS, HIDDEN), torch.randn(HIDDEN, 2 * EXPERTS)
    folder = written_by(tmp_path / "lora", version, down, up)
    then, now = VERSIONS[version][is_transposed], VERSIONS["0.21.2"][is_transposed]
    if then != now:
        with pytest.raises(FormatError, match="square matrices.*two ways"):
            patched(net, [(folder, 1.0)])
        return
    added = values(patched(net, [(folder, 1.0)]))["experts.down_proj"] - net.experts.down_proj
    torch.testing.assert_close(added, stacked(now, up, down), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["second", "third"])
@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_show_the_order_of_the_factors(tmp_path, version, way):
    net = Net()
    inputs, outputs = (HIDDEN, WIDE) if way == "second" else (WIDE, HIDDEN)
    down, up = torch.randn(2 * EXPERTS, inputs), torch.randn(outputs, 2 * EXPERTS)
    folder = written_by(tmp_path / "lora", version, down, up)
    added = values(patched(net, [(folder, 1.0)]))["experts.down_proj"] - net.experts.down_proj
    torch.testing.assert_close(added, stacked(way, up, down), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_right_is_refused(tmp_path):
    net = Net()
    adapter(tmp_path, net, target_parameters=BOTH)
    file = tmp_path / "adapter_model.safetensors"
    config = tmp_path / "adapter_config.json"
    good, said = load_file(file), json.loads(config.read_text())
    outer, inner = (
        f"base_model.model.experts{level}.lora_A.weight" for level in ("", ".base_layer")
    )
    cases = {
        "multiple of 3": {outer: torch.ones(5, WIDE), outer.replace("A", "B"): torch.ones(HIDDEN, 5)},
        "r=2, its factors have rank 1": {
            outer: torch.ones(3, WIDE), outer.replace("A", "B"): torch.ones(HIDDEN, 3),
        },
        "made for": {inner: torch.ones(6, HIDDEN + 1)},
        "do not make a product": {outer: torch.ones(3, WIDE)},
        "two factors, found": {outer.replace("lora_A", "lora_magnitude_vector"): torch.ones(HIDDEN)},
    }  # fmt: skip
    for message, changed in cases.items():
        save_file(good | changed, file)
        with pytest.raises(FormatError, match=message):
            patched(net, [(tmp_path, 1.0)])
    save_file({key: value for key, value in good.items() if "base_layer" not in key}, file)
    with pytest.raises(FormatError, match="2 parameters of .*factors for 1 of them"):
        patched(net, [(tmp_path, 1.0)])
    save_file(good, file)
    config.write_text(json.dumps(said | {"target_parameters": "experts"}))
    with pytest.raises(FormatError, match="target_parameters='experts'; expected a list"):
        patched(net, [(tmp_path, 1.0)])


@pytest.mark.filterwarnings("ignore:.*how strong it is")
def test_without_a_configuration_shapes_tell_or_it_is_refused(tmp_path):
    net = Net()
    wanted = adapter(tmp_path, net, target_parameters=BOTH, lora_alpha=2)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert_same(values(patched(net, [(state, 1.0)])), wanted)

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.zeros(3, 4))
            self.other = nn.Parameter(torch.zeros(3, 4))

    twins = nn.ModuleDict({"a": Twins(), "b": nn.Linear(2, 2)})
    state = {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(3, 1)}
    with pytest.raises(FormatError, match="'a' is a module with parameters .a.one, a.other"):
        patched(twins, [(state, 1.0)])


NAMES = {
    "gate_proj": ("gate_up_proj", 0, (WIDE, HIDDEN)), "up_proj": ("gate_up_proj", WIDE, (WIDE, HIDDEN)),
    "down_proj": ("down_proj", 0, (HIDDEN, WIDE)), "w1": ("gate_up_proj", 0, (WIDE, HIDDEN)),
    "w3": ("gate_up_proj", WIDE, (WIDE, HIDDEN)), "w2": ("down_proj", 0, (HIDDEN, WIDE)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "prefix", ["model.experts.", "base_model.model.experts.", "experts.", "lora_unet_experts_"]
)
def test_experts_one_by_one(prefix, mode):
    net, state = Net(), {}
    wanted = {name: p.detach().clone() for name, p in net.named_parameters()}
    torch.manual_seed(3)
    for expert in (2, 0):
        for layer in ("w1", "w3", "w2") if expert else ("up_proj", "gate_proj", "down_proj"):
            stack, first, (rows, columns) = NAMES[layer]
            down, up = torch.randn(2, columns), torch.randn(rows, 2)
            flat = "_" if prefix.endswith("_") else "."
            stem = f"{prefix}{expert}{flat}{layer}"
            state |= {
                f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(4.0),
            }  # fmt: skip
            wanted[f"experts.{stack}"][expert, first : first + rows] += 2 * up @ down
    assert_same(values(patched(net, [(state, 1.0)], mode)), wanted)


def test_experts_one_by_one_that_do_not_fit():
    factors = {"lora_down.weight": torch.ones(2, HIDDEN), "lora_up.weight": torch.ones(WIDE + 1, 2)}
    wrong = {f"experts.0.gate_proj.{name}": value for name, value in factors.items()}
    with pytest.raises(FormatError, match="gate_proj.*made for"):
        patched(Net(), [(wrong, 1.0)])
    beyond = {f"experts.3.{k}": v for k, v in {"w2.lora_down.weight": torch.ones(2, WIDE),
              "w2.lora_up.weight": torch.ones(HIDDEN, 2)}.items()}  # fmt: skip
    for net, state in ((Net(), beyond), (Net(is_transposed=True), wrong)):
        with pytest.raises(FormatError, match="fit no weight"):
            patched(net, [(state, 1.0)])
    with pytest.raises(FormatError, match="'experts.3.w2': there are 3 experts, counted from 0"):
        patched(Net(), [(beyond, 1.0)])
    loha = {f"experts.0.w1.hada_w{i}_{f}": torch.ones(WIDE if f == "a" else 1, 1 if f == "a" else HIDDEN)
            for i in (1, 2) for f in "ab"}  # fmt: skip
    with pytest.raises(FormatError, match="LoHa cannot go on one of the experts"):
        patched(Net(), [(loha, 1.0)])


def test_weights_with_gaps_are_merged():
    """Fetches patch rows that lie one after the other; others are merged, with the same bits."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False))
    net[0].weight = nn.Parameter(torch.randn(4, 6).T)
    state = {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(6, 1)}
    for mode in MODES:
        model = patched(net, [(state, 1.0)], mode)
        assert torch.equal(values(model)["0.weight"], net[0].weight + 1)
