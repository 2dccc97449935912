# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of itself is obeyed, or refused by its name. The reference is PEFT."""

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.errors import FormatError
from distorch.lora.configuration import KNOWN_TYPES

RANK = 4


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})


def factors(prefix="base_model.model.", names=("up", "down")):
    torch.manual_seed(1)
    weights = net().state_dict()
    found = {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        found[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, columns)
        found[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, RANK)
    return found


def product(state, stem):
    return state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]


def changes(lora, module=None, **options):
    """What a LoRA adds to each weight that it changes."""
    module = net() if module is None else module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(lora, 1.0)], **options)
    after = {name: value - before[name] for name, value in module.state_dict().items()}
    return {name: value for name, value in after.items() if value.any()}


def folder_with(path, state=None, **config):
    """An adapter as PEFT saves it, with these keys in its configuration."""
    save_file(factors() if state is None else state, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [*peft.PeftType, "A_TYPE_TO_COME"])
def test_every_type_is_known_or_refused_by_name(tmp_path, kind):
    name = str(getattr(kind, "value", kind))
    folder = folder_with(tmp_path, peft_type=name, r=RANK, lora_alpha=RANK, alpha=RANK)
    if name in KNOWN_TYPES:
        assert changes(folder).keys() == {"up.weight", "down.weight"}
        return
    with pytest.raises(FormatError, match=f"peft_type '{name}'.*Merge it with PEFT"):
        changes(folder)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base(tmp_path, start):
    state = factors()
    folder = folder_with(tmp_path, state, r=RANK, lora_alpha=RANK, init_lora_weights=start)
    wanted = {f"{n}.weight": product(state, f"base_model.model.{n}") for n in ("up", "down")}
    close(changes(folder), wanted)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "one_to_come"]
)
def test_starts_that_change_the_base_are_refused(tmp_path, start):
    folder = folder_with(tmp_path, r=RANK, lora_alpha=RANK, init_lora_weights=start)
    with pytest.raises(FormatError, match=f"'{start}'.*path_initial_model_for_weight_conversion"):
        changes(folder)
    with pytest.raises(FormatError, match=start):
        changes(folder, strict_loras=False)


def test_pissa_that_peft_converted(tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], init_lora_weights="pissa")
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    told = tmp_path / "initial"
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(told))
    before = base.state_dict()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    merged = loaded.merge_and_unload().state_dict()
    wanted = {name: merged[name] - before[name] for name in ("0.weight", "2.weight")}
    close(changes(tmp_path / "out", copy.deepcopy(base)), wanted)


CHANGING = {
    "layer_replication": [[0, 1], [0, 2]], "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 1}, "use_bdlora": {"nblocks": 2}, "use_qalora": True,
    "kasa_config": {"beta": 1.0}, "monteclora_config": {"samples": 1}, "coft": True,
    "a_key_to_come": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGING)
def test_keys_that_change_the_result(tmp_path, key):
    folder = folder_with(tmp_path, r=RANK, lora_alpha=RANK, **{key: CHANGING[key]})
    with pytest.raises(FormatError, match=f"{key}="):
        changes(folder)
    off = folder_with(tmp_path, r=RANK, lora_alpha=RANK, **{key: None})
    assert changes(off).keys() == {"up.weight", "down.weight"}


def test_all_keys_of_lora_are_judged(tmp_path):
    """A plain LoRA as the installed PEFT writes it, with every key that it knows."""
    model = get_peft_model(net(), LoraConfig(r=RANK, lora_alpha=2, target_modules=["up", "down"],
                                             init_lora_weights=False))  # fmt: skip
    model.save_pretrained(tmp_path)
    before = net().state_dict()
    merged = PeftModel.from_pretrained(net(), tmp_path).merge_and_unload().state_dict()
    wanted = {n: merged[n] - before[n] for n in ("up.weight", "down.weight")}
    close(changes(tmp_path), wanted)


def test_defaults_are_those_of_peft(tmp_path):
    state = factors()
    found = changes(folder_with(tmp_path, state, peft_type="LORA", r=RANK))
    wanted = {f"{n}.weight": 2 * product(state, f"base_model.model.{n}") for n in ("up", "down")}
    close(found, wanted)  # alpha 8 of rank 4


DISAGREE = {
    "rank": ({"r": 2, "lora_alpha": 4}, r"r=2, its factors have rank 4"),
    "no alpha": ({"r": RANK, "lora_alpha": None}, "lora_alpha=None"),
    "magnitudes": ({"r": RANK, "use_dora": True}, "use_dora=True.*no magnitudes"),
    "fewer targets": ({"r": RANK, "target_modules": ["up"]}, r"target_modules=\['up'\].*'down'"),
    "a pattern": ({"r": RANK, "target_modules": r"(.*\.)?up"}, "target_modules"),
    "excluded": ({"r": RANK, "exclude_modules": ["down"]}, "exclude_modules.*'down'"),
    "no pattern": ({"r": RANK, "alpha_pattern": {"(": 1}}, r"'\(' in its alpha_pattern"),
    "no table": ({"r": RANK, "rank_pattern": [1]}, "rank_pattern is no table"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREE)
def test_a_configuration_that_does_not_fit_its_tensors(tmp_path, case):
    config, message = DISAGREE[case]
    with pytest.raises(FormatError, match=message):
        changes(folder_with(tmp_path, **config))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(4))


LAYERS = {
    "those": ({"layers_to_transform": [1, 3]}, [1, 3]),
    "one": ({"layers_to_transform": 2}, [2]),
    "their pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, [0]),
    "another one": ({"layers_to_transform": [1]}, [1, 2]),
    "another pattern": ({"layers_to_transform": [1], "layers_pattern": ["h"]}, [1]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_to_transform(tmp_path, case):
    config, numbers = LAYERS[case]
    state = {}
    for number in numbers:
        stem = f"base_model.model.layers.{number}.q"
        state |= {
            f"{stem}.lora_A.weight": torch.ones(1, 4),
            f"{stem}.lora_B.weight": torch.ones(4, 1),
        }
    folder = folder_with(tmp_path, state, r=1, lora_alpha=1, target_modules=["q"], **config)
    if "another" in case:
        with pytest.raises(FormatError, match=r"layers_to_transform=\[1\].*layers.[12].q"):
            changes(folder, Layers())
    else:
        assert changes(folder, Layers()).keys() == {f"layers.{n}.q.weight" for n in numbers}


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_patterns_that_are_none(tmp_path, key):
    with pytest.raises(FormatError, match=rf"'up\(' in its {key} is no pattern"):
        changes(folder_with(tmp_path, r=RANK, **{key: "up("}))


def test_a_renamed_file_of_peft(tmp_path):
    state = factors()
    folder_with(tmp_path, state, r=RANK, lora_alpha=3 * RANK)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    wanted = 3 * product(state, "base_model.model.up")
    for source in (tmp_path, tmp_path / "mine.safetensors"):
        torch.testing.assert_close(changes(source)["up.weight"], wanted)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="neither a configuration nor alphas"):
        changes(tmp_path)


def test_a_state_dict_of_peft_does_not_say_how_strong_it_is():
    with pytest.warns(UserWarning, match=r"a LoRA state dict has keys of PEFT.*alpha / rank"):
        changes(factors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = {key.removeprefix("base_model.model."): v for key, v in factors().items()}
        changes(plain)
        alphas = {"base_model.model.up.alpha": torch.tensor(float(RANK))}
        changes(factors() | alphas)


def test_a_folder_without_its_configuration(tmp_path):
    folder_with(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="adapter_config.json is missing beside it"):
        changes(tmp_path)


def test_a_file_that_was_trained_further_is_read_again(tmp_path):
    state = factors()
    module = distorch.distribute(net(), "cpu,*", min_bytes=0, compute="cpu")
    before = net().state_dict()["up.weight"]
    for alpha in (RANK, 2 * RANK):
        distorch.set_loras(module, [(folder_with(tmp_path, state, r=RANK, lora_alpha=alpha), 1.0)])
        wanted = before + alpha / RANK * product(state, "base_model.model.up")
        torch.testing.assert_close(distorch.materialize(module["up"].weight), wanted)


# --- configurations in metadata ---


def file_with(path, state, metadata):
    save_file(state, path / "l.safetensors", metadata)
    return path / "l.safetensors"


def told(**parts):
    """As diffusers writes them: one table, keys under the names of parts."""
    table = {f"{part}.{key}": v for part, config in parts.items() for key, v in config.items()}
    return {"lora_adapter_metadata": json.dumps(table)}


def test_each_part_has_its_own_scale(tmp_path):
    state = factors("text_encoder.", ["up"]) | factors("unet.", ["down"])
    metadata = told(
        text_encoder={"r": RANK, "lora_alpha": RANK}, unet={"r": RANK, "lora_alpha": 3 * RANK}
    )
    both = changes(file_with(tmp_path, state, metadata))
    wanted = {
        "up.weight": product(state, "text_encoder.up"),
        "down.weight": 3 * product(state, "unet.down"),
    }
    close(both, wanted)


def test_a_stem_that_belongs_to_no_part(tmp_path):
    metadata = told(unet={"r": RANK, "lora_alpha": 4}, text_encoder={"r": RANK, "lora_alpha": 8})
    with pytest.raises(FormatError, match="text_encoder.*does not say to which it belongs"):
        changes(file_with(tmp_path, factors(""), metadata))


@pytest.mark.parametrize(
    ("pattern", "factor"),
    [("^up", 2), ("up", 2), ("u.", 2), ("(up|other)", 2), ("^transformer.up", 1), ("p", 1)],
)
def test_patterns_are_for_the_names_of_the_part(tmp_path, pattern, factor):
    state = factors("transformer.")
    config = {"r": RANK, "lora_alpha": RANK, "alpha_pattern": {pattern: 2 * RANK}}
    found = changes(file_with(tmp_path, state, told(transformer=config)))
    torch.testing.assert_close(found["up.weight"], factor * product(state, "transformer.up"))
    torch.testing.assert_close(found["down.weight"], product(state, "transformer.down"))


def test_flat_keys_and_own_alphas(tmp_path):
    state = factors("transformer.")
    flat = {"transformer.lora_alpha": "16", "transformer.r": "4", "transformer.use_rslora": "True"}
    found = changes(file_with(tmp_path, state, flat))
    torch.testing.assert_close(found["up.weight"], 8 * product(state, "transformer.up"))
    own = {**state, "transformer.up.alpha": torch.tensor(2.0)}
    found = changes(file_with(tmp_path, own, {"transformer.lora_alpha": "16"}))
    torch.testing.assert_close(found["up.weight"], 0.5 * product(state, "transformer.up"))
    torch.testing.assert_close(found["down.weight"], 4 * product(state, "transformer.down"))


def test_metadata_is_judged_like_a_file(tmp_path):
    state = factors("transformer.")
    for metadata, message in (
        (told(transformer={"init_lora_weights": "pissa"}), "pissa"),
        ({"transformer.init_lora_weights": "olora"}, "olora"),
        (told(transformer={"peft_type": "VERA"}), "VERA"),
        ({"lora_adapter_metadata": "["}, "no JSON"),
        ({"lora_adapter_metadata": "[]"}, "no table"),
    ):
        with pytest.raises(FormatError, match=message):
            changes(file_with(tmp_path, state, metadata))


# --- magnitudes, and what replaces ---


class Square(nn.Module):
    """Layers as wide as they are deep, where a shape does not say what a magnitude is for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(8, 8, 3)
        self.line = nn.Conv1d(8, 8, 1)
        self.table = nn.Embedding(8, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x


def merged_by_peft(base, folder):
    after = PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
    before = base().state_dict()
    return {n: v - before[n] for n, v in after.items() if not torch.equal(v, before[n])}


def test_magnitudes_of_square_layers(tmp_path):
    config = LoraConfig(r=2, use_dora=True, target_modules=["conv", "line", "table", "linear"])
    model = get_peft_model(Square(), config)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    wanted = merged_by_peft(Square, tmp_path)
    assert len(wanted) == 4
    close(changes(tmp_path, Square()), wanted, 1e-4)


def test_rows_of_zeros_under_a_magnitude():
    module = nn.ModuleDict({"proj": nn.Linear(8, 6, bias=False)})
    with torch.no_grad():
        module["proj"].weight[2] = 0
    torch.manual_seed(7)
    state = {"proj.lora_A.weight": torch.randn(2, 8), "proj.lora_B.weight": torch.randn(6, 2),
             "proj.dora_scale": torch.rand(6, 1)}  # fmt: skip
    state["proj.lora_B.weight"][2] = 0
    moved = module["proj"].weight.detach() + product(state, "proj")
    wanted = state["proj.dora_scale"] * moved / moved.norm(dim=1, keepdim=True)
    found = changes(state, copy.deepcopy(module))["proj.weight"] + module["proj"].weight.detach()
    assert not found[2].any()
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[rest], wanted[rest])


class Words(nn.Module):
    def __init__(self, count=12):
        super().__init__()
        torch.manual_seed(8)
        self.words = nn.Embedding(count, 8)
        self.proj = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.words

    def forward(self, x):
        return self.score(self.proj(self.words(x)))


WHOLE = {
    "trained head": {"modules_to_save": ["score"]},
    "rows of tokens": {"trainable_token_indices": {"words": [3, 7]}},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_saved_whole_replaces(tmp_path, case, strict):
    model = get_peft_model(Words(), LoraConfig(r=2, target_modules=["proj"], **WHOLE[case]))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    wanted = merged_by_peft(Words, tmp_path)
    assert len(wanted) > 1
    close(changes(tmp_path, Words(), strict_loras=strict), wanted)


def test_a_vocabulary_of_another_size(tmp_path):
    state = {"base_model.model.words.weight": torch.ones(14, 8),
             "base_model.model.proj.lora_A.weight": torch.ones(2, 8),
             "base_model.model.proj.lora_B.weight": torch.ones(8, 2)}  # fmt: skip
    folder = folder_with(tmp_path, state, r=2)
    with pytest.raises(FormatError, match=r"'words.weight'.*\[14, 8\].*\(12, 8\)"):
        changes(folder, Words())
    with pytest.warns(UserWarning, match="words.weight"):
        found = changes(folder, Words(), strict_loras=False)
    assert found.keys() == {"proj.weight"}


def test_token_rows_without_their_numbers(tmp_path):
    key = "base_model.model.words.token_adapter.trainable_tokens_delta"
    folder = folder_with(Path(tmp_path), {key: torch.ones(2, 8)}, r=2)
    with pytest.raises(FormatError, match="trainable_token_indices"):
        changes(folder, Words())


def test_the_documentation_names_what_is_known():
    from distorch.formats import quantisation, scales
    from distorch.lora import configuration

    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    patterns = (*scales._FACTORS, *scales._LARGEST, *scales._OF_ACTIVATIONS, scales._LAYOUT)
    known = {
        *quantisation.FORMATS, *KNOWN_TYPES, *configuration._USED, *configuration._REASONS,
        *(word for word in configuration._KEEPING if word != "default"),
        *(pattern.format("X") for pattern in patterns),
    }  # fmt: skip
    missing = [name for name in sorted(known - {"peft_type"}) if f"`{name}`" not in text]
    assert not missing and "`peft_type`" in text
