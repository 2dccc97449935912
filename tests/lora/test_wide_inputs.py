# SPDX-License-Identifier: Apache-2.0
"""LoRAs that make the layer for the model's input wider: FLUX's control LoRAs."""

import copy
import sys

import pytest
import torch
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError, PlacementError

OWN, WIDE, HIDDEN = 8, 16, 16
MODES = ["merge", "fetch", "background"]


def flux(**options):
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=OWN, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4), **options,
    )  # fmt: skip


def lora(columns, seed=1, stem="transformer.x_embedder", rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(HIDDEN, rank, generator=generator),
    }


def control(seed=1):
    """With what the published ones have: norms, and a bias."""
    state = lora(WIDE, seed) | lora(HIDDEN, seed, "transformer.transformer_blocks.0.attn.to_q")
    for stem in ("x_embedder", "transformer_blocks.0.attn.to_q"):
        state[f"transformer.{stem}.lora_B.bias"] = torch.ones(HIDDEN)
    state["transformer.transformer_blocks.0.attn.norm_q.weight"] = torch.full((8,), 2.0)
    return state


def distributed(model, spec="cpu,0b;disk,*"):
    return distorch.distribute(model, spec, min_bytes=0, compute="cpu")


def inputs(channels):
    generator = torch.Generator().manual_seed(2)

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": rand(1, 4, channels), "encoder_hidden_states": rand(1, 3, 12),
        "pooled_projections": rand(1, 10), "timestep": torch.ones(1), "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


def widths(model):
    """All that says how wide the layer is."""
    layer = model.x_embedder
    return {layer.weight.shape[1], layer.in_features, model.config.in_channels}


def weights(model):
    return {name: distorch.materialize(p).detach() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_as_diffusers_loads_it(mode, strength):
    plain = flux()
    pipe = FluxControlPipeline(None, None, None, None, None, None, plain)
    pipe.load_lora_weights(control(), adapter_name="control")
    pipe.set_adapters(["control"], [strength])
    model = distributed(flux())
    distorch.set_loras(model, [(control(), strength)], lora_mode=mode)
    distorch.finish_merging(model)
    x = inputs(WIDE)
    torch.testing.assert_close(model(**x)[0], plain(**x)[0], rtol=1e-4, atol=1e-4)
    assert widths(model) == {WIDE} == {plain.config.in_channels}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["cpu,0b;disk,*", "cpu,*"])
@pytest.mark.parametrize("loaded", [False, True])
def test_on_and_off_and_elsewhere(tmp_path, mode, spec, loaded):
    model = flux().bfloat16()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    if loaded:
        save_file(base, tmp_path / "base.safetensors")
        options = {"min_bytes": 0, "compute": "cpu", "loras": [(control(), 0.5)]}
        distorch.load(model, tmp_path / "base.safetensors", spec, lora_mode=mode, **options)
    else:
        distributed(model, spec)
        distorch.set_loras(model, [(control(), 0.5)], lora_mode=mode)

    def expected(*pairs):
        exact = torch.zeros(HIDDEN, WIDE)
        exact[:, :OWN] = base["x_embedder.weight"]
        for state, strength in pairs:
            down = state["transformer.x_embedder.lora_A.weight"]
            up = state["transformer.x_embedder.lora_B.weight"]
            exact[:, : down.shape[1]] += strength * (up @ down)
        return exact.bfloat16()

    def close(*pairs):
        found = distorch.materialize(model.x_embedder.weight)
        torch.testing.assert_close(found, expected(*pairs), rtol=2**-7, atol=1e-3)

    close((control(), 0.5))
    assert widths(model) == {WIDE}
    both = [(lora(OWN, 3), 2.0), (control(), 0.5)]
    distorch.set_loras(model, both)
    close(*both)
    distorch.redistribute(model, "cpu,*")
    close(*both)
    other = copy.deepcopy(model)
    distorch.set_loras(model, [(lora(OWN, 3), 2.0)])
    assert widths(model) == {OWN} and widths(other) == {WIDE}
    distorch.set_loras(other, [])
    for restored in (model, other):
        distorch.set_loras(restored, [])
        assert widths(restored) == {OWN}
        assert all(torch.equal(value, base[name]) for name, value in weights(restored).items())


def test_strength_zero_keeps_the_layer_wide():
    model = distributed(flux())
    distorch.set_loras(model, [(control(), 0.0)])
    wide = distorch.materialize(model.x_embedder.weight)
    assert widths(model) == {WIDE} and not wide[:, OWN:].any()
    assert torch.equal(wide[:, :OWN], flux().x_embedder.weight)


def test_loading_again_begins_with_the_own_width(tmp_path):
    save_file(flux().state_dict(), tmp_path / "base.safetensors")
    model = flux()
    for loras, width in (([(control(), 1.0)], WIDE), ([], OWN), ([(control(), 1.0)], WIDE)):
        options = {"min_bytes": 0, "compute": "cpu", "loras": loras}
        distorch.load(model, tmp_path / "base.safetensors", "cpu,0b;disk,*", **options)
        assert widths(model) == {width}


def test_a_wide_model_takes_narrow_loras_too():
    model = flux()
    model.x_embedder = nn.Linear(WIDE, HIDDEN)
    model.register_to_config(in_channels=WIDE)
    before = model.x_embedder.weight.clone()
    distributed(model)
    distorch.set_loras(model, [(lora(OWN), 1.0)])
    added = distorch.materialize(model.x_embedder.weight) - before
    up, down = (lora(OWN)[f"transformer.x_embedder.lora_{f}.weight"] for f in "BA")
    torch.testing.assert_close(added[:, :OWN], up @ down, rtol=1e-4, atol=1e-4)
    assert not added[:, OWN:].any()


def test_the_configuration_makes_the_same_model():
    for channels in (None, OWN):
        model = distributed(flux(out_channels=channels))
        distorch.set_loras(model, [(control(), 1.0)])
        again = FluxTransformer2DModel.from_config(model.config)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(
            again.get_parameter(name).shape == value.shape for name, value in weights(model).items()
        )
        distorch.set_loras(model, [])
        assert (model.config.in_channels, model.config.out_channels) == (OWN, channels)


class Plain(nn.Module):
    """As the authors of FLUX write it: no configuration, but an attribute."""

    def __init__(self):
        super().__init__()
        self.in_channels = OWN
        self.img_in = nn.Linear(OWN, HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)


def test_original_names_and_comfyui_s_key():
    model = distributed(Plain())
    before = distorch.materialize(model.img_in.weight)
    state = lora(WIDE, stem="img_in") | {"img_in.reshape_weight": torch.tensor([HIDDEN, WIDE])}
    distorch.set_loras(model, [(state, 1.0)])
    assert model.in_channels == model.img_in.in_features == WIDE
    distorch.set_loras(model, [])
    assert model.in_channels == model.img_in.in_features == OWN
    assert torch.equal(distorch.materialize(model.img_in.weight), before)


def wrong_layer():
    return Plain(), lora(WIDE + 1, stem="out"), "'out.weight'.*made for"


def two_layers_of_that_width():
    model = Plain()
    model.control_img_in = nn.Linear(OWN, HIDDEN)
    return model, lora(WIDE, stem="img_in"), "'img_in.weight'.*made for"


def more_outputs():
    state = lora(WIDE, stem="img_in")
    state["img_in.lora_B.weight"] = torch.ones(HIDDEN + 1, 2)
    return Plain(), state, "'img_in.weight'.*made for"


def not_finite():
    state = lora(WIDE, stem="img_in")
    state["img_in.lora_A.weight"][0, 0] = float("nan")
    return Plain(), state, "img_in.*NaN"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [wrong_layer, two_layers_of_that_width, more_outputs, not_finite])
def test_what_cannot_be_right_changes_nothing(case, mode):
    model, state, message = case()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distributed(model)
    with pytest.raises(FormatError, match=message):
        distorch.set_loras(model, [(state, 1.0)], lora_mode=mode)
    assert model.in_channels == model.img_in.in_features == OWN
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    with pytest.raises(FormatError):
        distorch.set_loras(model, [(lora(WIDE, stem="img_in"), 1.0), (state, 1.0)])
    assert model.in_channels == model.img_in.in_features == model.img_in.weight.shape[1] == OWN


def test_an_error_behind_it_takes_the_width_back():
    """A later weight fails: the layer is wide or narrow as it was."""
    bad = lora(HIDDEN, stem="out")
    bad["out.lora_A.weight"][0, 0] = float("inf")
    for before, after in (([], [(lora(WIDE, stem="img_in"), 1.0)]),
                          ([(lora(WIDE, stem="img_in"), 1.0)], [])):  # fmt: skip
        model = distributed(Plain())
        distorch.set_loras(model, before)
        known = weights(model)
        with pytest.raises(FormatError):
            distorch.set_loras(model, [*after, (bad, 1.0)])
        width = WIDE if before else OWN
        assert model.in_channels == model.img_in.in_features == width
        assert all(torch.equal(value, known[name]) for name, value in weights(model).items())


def test_written_to_while_wide():
    model = distributed(Plain())
    distorch.set_loras(model, [(lora(WIDE, stem="img_in"), 0.0)])
    model.img_in.weight.add_(1)
    with pytest.raises(PlacementError, match="written to"):
        distorch.set_loras(model, [])
    assert model.img_in.in_features == WIDE


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_while_it_gets_narrow(monkeypatch, strength, times):
    """The weight cannot be written: all is as before, or the weight is said to be lost."""
    from distorch.patching import forms

    model = Plain()
    model.first = nn.Linear(HIDDEN, HIDDEN)
    own = model.img_in.weight.clone()
    distributed(model)
    loras = [(lora(WIDE, stem="img_in"), strength), (lora(HIDDEN, stem="first"), 1.0)]
    distorch.set_loras(model, loras)
    before = weights(model)
    left, real = [times], forms._put

    def put(group, original, value):
        if left[0] and group.name == "img_in.weight":
            left[0] -= 1
            if left[0] or times == 1:  # the way back finds a weight that is another one
                real(group, original, value)
            raise distorch.FetchError("the disk is gone")
        return real(group, original, value)

    monkeypatch.setattr(forms, "_put", put)
    error = distorch.FetchError if times == 1 else PlacementError
    with pytest.raises(error, match="the disk is gone" if times == 1 else "load the model again"):
        distorch.set_loras(model, [])
    width = WIDE if times == 1 else OWN  # what is lost is narrow already, and its layer knows it
    assert model.in_channels == model.img_in.in_features == model.img_in.weight.shape[1] == width
    now = weights(model)
    lost = {"img_in.weight"} if times == 2 else set()
    assert all(torch.equal(now[name], before[name]) for name in before.keys() - lost)
    if lost:
        return
    distorch.set_loras(model, [])
    assert model.in_channels == model.img_in.in_features == model.img_in.weight.shape[1] == OWN
    assert torch.equal(distorch.materialize(model.img_in.weight), own)


@pytest.mark.parametrize("on", [True, False])
def test_an_interrupt_at_any_line(on):
    """Weight, layer and model are wide or narrow together, and the next call works."""
    from distorch.patching import forms, widths

    files = {forms.__file__, widths.__file__}
    wide = [(lora(WIDE, stem="img_in"), 1.0)]
    before, after = ([], wide) if on else (wide, [])
    line, stopped = 0, True
    while stopped:
        model = distributed(Plain())
        distorch.set_loras(model, before)
        line, stopped, left = line + 1, False, [line]

        def local(frame, event, argument, left=left):
            if event == "line" and left[0] == 0:
                left[0] = -1
                raise KeyboardInterrupt
            left[0] -= event == "line" and left[0] > 0
            return local

        def trace(frame, event, argument, local=local):
            return local if frame.f_code.co_filename in files else None

        sys.settrace(trace)
        try:
            distorch.set_loras(model, after)
        except KeyboardInterrupt:
            stopped = True
        finally:
            sys.settrace(None)
        said = {model.in_channels, model.img_in.in_features, model.img_in.weight.shape[1]}
        assert len(said) == 1, line
        distorch.set_loras(model, after)
        assert {model.in_channels, model.img_in.in_features} == {WIDE if on else OWN}
    assert line > 60


class Packed(nn.Linear):
    """Two numbers in a byte, as quantised layers have them."""

    def __init__(self):
        super().__init__(OWN, HIDDEN, bias=False)
        packed = torch.randint(0, 255, (HIDDEN, OWN // 2), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_packed_layers_are_let_alone(tmp_path):
    model = Plain()
    model.img_in, model.out = Packed(), Packed()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    distorch.load(model, tmp_path / "base.safetensors", "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    assert model.in_channels == model.img_in.in_features == model.out.in_features == OWN
    for columns in (OWN, WIDE):
        with pytest.raises(FormatError, match=r"'img_in.weight'.*made for"):
            distorch.set_loras(model, [(lora(columns, stem="img_in"), 1.0)])


def test_beside_other_kinds_on_the_same_layer():
    """Replacements, differences, DoRA by row and by column: on the first columns."""
    narrow, wide = lora(OWN, 3, "img_in"), lora(WIDE, 4, "img_in")
    value = torch.randn(HIDDEN, OWN)

    def delta(state):
        return state["img_in.lora_B.weight"] @ state["img_in.lora_A.weight"]

    base = Plain().img_in.weight.clone()
    rows, columns = torch.rand(HIDDEN, 1) + 1, torch.rand(1, OWN) + 1
    moved = base + delta(narrow)
    cases = {
        "replaced": ({"img_in.set_weight": value}, value),
        "difference": ({"img_in.diff": value}, base + value),
        "by row": (
            narrow | {"img_in.dora_scale": rows}, moved * rows / moved.norm(dim=1, keepdim=True),
        ),
        "by column": (
            narrow | {"img_in.dora_scale": columns},
            moved * columns / moved.norm(dim=0, keepdim=True),
        ),
    }  # fmt: skip
    for state, changed in cases.values():
        torch.manual_seed(0)
        model = Plain()
        model.img_in.weight.copy_(base)
        distributed(model)
        for loras in ([(state, 1.0), (wide, 0.5)], [(wide, 0.5), (state, 1.0)]):
            replaced = "img_in.set_weight" in state
            distorch.set_loras(model, loras)
            expected = torch.zeros(HIDDEN, WIDE)
            expected[:, :OWN] = changed
            if not (replaced and loras[0][0] is wide):
                expected += 0.5 * delta(wide)
            else:  # the replacement comes last: of its columns nothing else is left
                expected[:, OWN:] = 0.5 * delta(wide)[:, OWN:]
            found = distorch.materialize(model.img_in.weight)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tied_input_layers():
    model = nn.ModuleDict({"a": Plain(), "b": Plain()})
    model["b"].img_in.weight = model["a"].img_in.weight
    distributed(model)
    both = lora(WIDE, 1, "a.img_in") | lora(WIDE, 1, "b.img_in")
    narrow = lora(OWN, 2, "a.img_in") | lora(OWN, 2, "b.img_in")
    for loras, width in (([(both, 1.0)], WIDE), ([(both, 1.0), (narrow, 1.0)], WIDE), ([], OWN)):
        distorch.set_loras(model, loras)
        for part in model.values():
            assert (
                part.in_channels == part.img_in.in_features == part.img_in.weight.shape[1] == width
            )


def test_int8_that_stays_int8():
    """The result is rounded and clamped, as that of other layers is."""
    model = Plain()
    whole = torch.randint(-100, 100, (HIDDEN, OWN), dtype=torch.int8)
    model.img_in.weight = nn.Parameter(whole, requires_grad=False)
    distributed(model)
    state = lora(WIDE, stem="img_in")
    distorch.set_loras(model, [(state, 30.0)], lora_mode="merge", patched_dtype="base")
    added = 30 * state["img_in.lora_B.weight"] @ state["img_in.lora_A.weight"]
    exact = nn.functional.pad(whole.float(), (0, WIDE - OWN)) + added
    expected = exact.round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(distorch.materialize(model.img_in.weight), expected)


def test_the_report_says_it():
    model = distributed(Plain())
    distorch.set_loras(model, [(lora(WIDE, stem="img_in"), 0.5), (lora(OWN, stem="img_in"), 1.0)])
    report = distorch.report(model)
    assert [row.get("wider") for row in report.loras] == [{"img_in.weight": (OWN, WIDE)}, None]
    assert f"img_in.weight has {WIDE} columns in place of {OWN}" in str(report)


def test_under_an_adapter_of_peft_it_gets_no_other_width():
    from peft import LoraConfig, inject_adapter_in_model

    model = Plain()
    inject_adapter_in_model(LoraConfig(target_modules=["img_in"]), model)
    distributed(model)
    with pytest.raises(FormatError, match="an adapter of PEFT is around it"):
        distorch.set_loras(model, [(lora(WIDE, stem="img_in"), 1.0)])
    model = distributed(Plain())
    distorch.set_loras(model, [(lora(WIDE, stem="img_in"), 1.0)])
    inject_adapter_in_model(LoraConfig(target_modules=["img_in"]), model)
    with pytest.raises(PlacementError, match="would get another width"):
        distorch.set_loras(model, [])
