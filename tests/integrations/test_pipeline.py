"""load_pipeline gives what diffusers' own from_pretrained gives, under one budget."""

import json
import shutil
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import distorch
from distorch.integrations import (
    distribute_pipeline,
    load_pipeline,
    load_pretrained,
    pipeline_report,
    set_pipeline_loras,
    undistribute_pipeline,
)
from tests import tiny_models as tiny

DISK = {"spec": "cpu,0b;disk,*", "min_bytes": 0}
PARTS = ("unet", "vae", "text_encoder")
MAKERS = [tiny.stable_diffusion, tiny.flux, tiny.wan, tiny.qwen_image]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines that are made once: name -> (folder, arguments of a small picture)."""
    made = {}

    def get(make):
        if make.__name__ not in made:
            made[make.__name__] = tiny.save_pipeline(make, tmp_path_factory.mktemp(make.__name__))
        return made[make.__name__]

    return get


@pytest.fixture
def folder(folders, tmp_path):
    """A Stable Diffusion pipeline of its own."""
    shutil.copytree(folders(tiny.stable_diffusion)[0], tmp_path / "sd")
    return tmp_path / "sd"


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a lighthouse", "num_inference_steps": 2, **options}
    with torch.inference_mode():
        out = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **options)
    return out.images if hasattr(out, "images") else out.frames


def small(pipe, **options):
    return draw(pipe, height=16, width=16, **options)


def resident(folder, dtype=torch.bfloat16, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **options)


def models(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def assert_same(pipe, reference):
    assert models(pipe).keys() == models(reference).keys()
    for part, wanted in models(reference).items():
        ours = getattr(pipe, part).state_dict()
        assert ours.keys() == wanted.state_dict().keys()
        for name, value in wanted.state_dict().items():
            assert ours[name].dtype == value.dtype, (part, name)
            assert torch.equal(ours[name], value), (part, name)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, "float16", "auto", {"vae": torch.float32, "default": "bfloat16"}],
    ids=str,
)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_as_diffusers_reads_it(folders, make, dtype):
    """Wan keeps some weights in float32, and Stable Diffusion's decoder may be asked to."""
    folder, _ = folders(make)
    pipe = load_pipeline(folder, dtype=dtype, **DISK)
    names = {"auto": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, dict):
        reference = resident(folder, {"vae": torch.float32, "default": torch.bfloat16})
    else:
        reference = resident(folder, names.get(dtype, dtype))
    assert type(pipe) is type(reference)
    assert_same(pipe, reference)
    report = pipeline_report(pipe)
    assert report.ok
    assert all(part.bytes["disk"] > part.bytes["cpu"] for part in report.parts.values())


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_same_picture(folders, make):
    folder, arguments = folders(make)
    wanted = draw(resident(folder), **arguments)
    pipe = load_pipeline(folder, "cpu,60kb;disk,*")
    assert torch.equal(draw(pipe, **arguments), wanted)
    distribute_pipeline(pipe, "cpu,20%;disk,80%")
    assert torch.equal(draw(pipe, **arguments), wanted)


# --- one budget ---


def test_one_budget_and_the_fast_place_for_what_runs_most(folders):
    folder, _ = folders(tiny.stable_diffusion)
    sizes = {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in models(resident(folder)).items()
    }
    budget = sizes["unet"] + 20_000
    pipe = load_pipeline(folder, f"cpu,{budget}b;disk,*")
    report = pipeline_report(pipe)
    assert report.ok
    assert report.bytes["cpu"] <= budget
    assert report.parts["unet"].bytes.get("disk", 0) < report.parts["vae"].bytes["disk"]
    assert report.bytes["cpu"] == sum(part.bytes["cpu"] for part in report.parts.values())
    text = str(report)
    assert "in all" in text
    assert "text_encoder" in text
    assert "<table>" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["ok"]


def test_a_budget_that_cannot_hold_is_said(folders):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.warns(distorch.PlacementWarning, match="more than its share of 1000") as warned:
        pipe = load_pipeline(folder, "cpu,1000b;disk,*", min_bytes="1mb")
    assert warned[0].filename == __file__
    assert not pipeline_report(pipe).ok


def test_rules_name_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(
        folder, "cpu,*;disk,10mb", min_bytes=0, rules=[("unet.*", "disk")], keep=["vae.*"],
        offload=["text_encoder.*.mlp.*"],
    )  # fmt: skip
    parts = pipeline_report(pipe).parts
    assert set(parts["unet"].bytes) == {"cpu", "disk"}
    assert parts["unet"].bytes["cpu"] == 0
    assert "disk" not in parts["vae"].bytes
    homes = parts["text_encoder"].placement
    assert {homes[name] for name in homes if ".mlp." in name} == {"disk"}
    with pytest.raises(distorch.PlacementError, match="matches no weight"):
        load_pipeline(folder, rules=[("unit.*", "disk")], **DISK)


def test_what_is_given_away_is_what_runs_least(folders):
    folder, _ = folders(tiny.stable_diffusion)
    size = sum(p.nbytes for p in resident(folder).text_encoder.parameters())
    pipe = load_pipeline(folder, virtual_vram=size // 2, donor="disk", compute="cpu", min_bytes=0)
    parts = pipeline_report(pipe).parts
    assert "disk" not in parts["unet"].bytes
    assert 0.8 * size // 2 < parts["text_encoder"].bytes["disk"] <= size // 2


# --- files ---


def test_files_for_a_part_and_components(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    other = {
        k: v * 2
        for k, v in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items()
    }
    save_file(other, tmp_path / "other.safetensors")
    scheduler = diffusers.EulerDiscreteScheduler()
    mine = resident(folder).text_encoder
    pipe = load_pipeline(
        folder, files={"unet": str(tmp_path / "other.safetensors")},
        components={"scheduler": scheduler, "text_encoder": mine}, **DISK,
    )  # fmt: skip
    assert pipe.scheduler is scheduler
    assert pipe.text_encoder is mine
    assert distorch.report(mine).bytes["disk"] > 0
    for name, value in other.items():
        assert torch.equal(pipe.unet.state_dict()[name], value)


def test_variants(folder):
    with pytest.raises(distorch.FormatError, match=r"variant='fp16'.*model.fp16.safetensors"):
        load_pipeline(folder, variant="fp16", **DISK)
    reference = resident(folder, torch.float16)
    reference.save_pretrained(folder, variant="fp16")
    assert_same(load_pipeline(folder, variant="fp16", **DISK), reference)


def test_attention_names_of_old_decoders(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name in list(tensors):
        for ours, old in new.items():
            if f".attentions.0.{ours}." in name:
                tensors[name.replace(ours, old)] = tensors.pop(name)
    assert any(".query." in name for name in tensors)
    save_file(tensors, path)
    assert_same(load_pipeline(folder, **DISK), resident(folder))


def original_names(pipe):
    """A Stable Diffusion pipeline of two levels in the names of the original checkpoint."""
    found = {}
    for name, value in pipe.text_encoder.state_dict().items():
        short = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{short}"] = value
    for name, value in pipe.vae.state_dict().items():
        old_name = name
        for new, old in (
            ("encoder.down_blocks.0.downsamplers.0", "encoder.down.0.downsample"),
            ("decoder.up_blocks.0.upsamplers.0", "decoder.up.1.upsample"),
            ("encoder.down_blocks.0.resnets", "encoder.down.0.block"),
            ("encoder.down_blocks.1.resnets", "encoder.down.1.block"),
            ("decoder.up_blocks.0.resnets", "decoder.up.1.block"),
            ("decoder.up_blocks.1.resnets", "decoder.up.0.block"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
            ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
            ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
        ):  # fmt: skip
            old_name = old_name.replace(new, old)
        attention = "attn_1" in old_name and value.dim() == 2
        found[f"first_stage_model.{old_name}"] = value[..., None, None] if attention else value
    for name, value in pipe.unet.state_dict().items():
        found[f"model.diffusion_model.{original_of_unet(name)}"] = value
    return {name: value.contiguous() for name, value in found.items()}


def original_of_unet(name):
    for new, old in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
        ("up_blocks.0.upsamplers.0", "output_blocks.1.2"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"),
    ):  # fmt: skip
        if name.startswith(f"{new}."):
            name = name.replace(new, old, 1)
    if "blocks." in name or "middle_block." in name:
        for new, old in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"),
                         ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
                         ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")):  # fmt: skip
            if "transformer_blocks" not in name:
                name = name.replace(f".{new}.", f".{old}.")
    return name


def test_one_file_with_the_whole_pipeline(folders, tmp_path, monkeypatch):
    folder, _ = folders(tiny.stable_diffusion)
    reference = resident(folder)
    file = tmp_path / "sd.safetensors"
    save_file(original_names(reference), file)
    configuration = tmp_path / "config"
    shutil.copytree(folder, configuration, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_same(load_pipeline(file, config=str(configuration), **DISK), reference)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(distorch.FormatError, match=r"taken for a whole pipeline.*config="):
        load_pipeline(file, **DISK)


def whole_file(reference, path, change=lambda tensors: tensors):
    save_file(change(original_names(reference)), path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if not k.endswith("diffusion_model.out.2.weight")},
         "unet: .*1 missing .conv_out.weight"),
        (lambda t: {**t, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
         "unet: .*conv_in.*the file has shape"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_not_replaced_by_the_folders(folders, tmp_path, change, said):
    folder, _ = folders(tiny.stable_diffusion)
    file = whole_file(resident(folder), tmp_path / "sd.safetensors", change)
    with pytest.raises(distorch.FormatError, match=said):
        load_pipeline(file, config=str(folder), **DISK)


def test_what_a_whole_file_lacks_is_from_the_folder(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    other = resident(folder)
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(2)
    file = whole_file(
        other, tmp_path / "sd.safetensors",
        lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")},
    )  # fmt: skip
    assert_same(load_pipeline(file, config=str(folder), **DISK), other)
    (tmp_path / "config").mkdir()
    shutil.copytree(
        folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"),
        dirs_exist_ok=True,
    )  # fmt: skip
    with pytest.raises(distorch.FormatError, match=r"has no weights of 'vae'.*files=.*'vae'"):
        load_pipeline(file, config=str(tmp_path / "config"), **DISK)


def test_a_file_for_a_part_is_never_replaced(folders, tmp_path, monkeypatch, caplog):
    """Where its conversion would compute, it is refused; only the folder's own is loaded whole."""
    folder, _ = folders(tiny.stable_diffusion)
    save_file(original_names(resident(folder)), tmp_path / "other.safetensors")
    monkeypatch.setattr("distorch.formats.naming.tracing._MOST_PIECES", 0)
    with pytest.raises(distorch.FormatError, match="vae: .*the conversion to the module's names"):
        load_pipeline(folder, files={"vae": str(tmp_path / "other.safetensors")}, **DISK)
    assert "is loaded whole" not in caplog.text


def test_models_that_diffusers_loads_itself(folder, monkeypatch):
    """A class that cannot be made empty: it is placed afterwards, within the same budget."""
    from distorch.integrations import source

    real = source._class_of
    monkeypatch.setattr(
        source, "_class_of",
        lambda folder, library, name: None if name == "AutoencoderKL" else real(folder, library, name),
    )  # fmt: skip
    pipe = load_pipeline(folder, **DISK)
    assert_same(pipe, resident(folder))
    assert pipeline_report(pipe).parts["vae"].bytes["disk"] > 0


# --- LoRAs ---


def loras(pipe):
    """A kohya file for the U-Net and the text encoder; and where its changes are."""
    torch.manual_seed(1)
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    text = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("layers.0.mlp.fc1"))
    found = {}
    for prefix, part, name in (
        ("lora_unet", pipe.unet, unet),
        ("lora_te", pipe.text_encoder, text),
    ):
        rows, columns = part.get_submodule(name).weight.shape
        stem = f"{prefix}_{name}".replace(".", "_")
        found[f"{stem}.lora_down.weight"] = torch.randn(2, columns)
        found[f"{stem}.lora_up.weight"] = torch.randn(rows, 2)
    return found, {"unet": f"{unet}.weight", "text_encoder": f"{text}.weight"}


def test_loras_go_to_the_parts_that_they_name(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    plain = resident(folder)
    state, places = loras(plain)
    save_file(state, tmp_path / "style.safetensors")
    pipe = load_pipeline(folder, loras=[(tmp_path / "style.safetensors", 0.5)], **DISK)

    def changed():
        return {
            part: [
                name for name, value in getattr(plain, part).state_dict().items()
                if not torch.equal(getattr(pipe, part).state_dict()[name], value)
            ]
            for part in PARTS
        }  # fmt: skip

    assert changed() == {**{part: [name] for part, name in places.items()}, "vae": []}
    half = pipe.unet.state_dict()[places["unet"]].clone()
    set_pipeline_loras(pipe, [(tmp_path / "style.safetensors", 1.0)])
    assert not torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    set_pipeline_loras(pipe, [(tmp_path / "style.safetensors", 0.5)])
    assert torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    distribute_pipeline(pipe, "cpu,50%;disk,50%")
    assert torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    set_pipeline_loras(pipe, [])
    assert not any(changed().values())


def test_loras_that_fit_nothing(folders):
    folder, _ = folders(tiny.stable_diffusion)
    state, places = loras(resident(folder))
    of_second = {k.replace("lora_te_", "lora_te2_"): v for k, v in state.items()}
    with pytest.raises(distorch.FormatError, match="keys for 'text_encoder_2'.*strict_loras=False"):
        load_pipeline(folder, loras=[(of_second, 1.0)], **DISK)
    unknown = {**state, "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 8),
               "lora_unet_nowhere.lora_up.weight": torch.zeros(8, 2)}  # fmt: skip
    pipe = load_pipeline(folder, loras=[(state, 1.0)], **DISK)
    before = {part: getattr(pipe, part).state_dict()[name].clone() for part, name in places.items()}
    with pytest.raises(distorch.FormatError, match="fit no weight"):
        set_pipeline_loras(pipe, [(unknown, 0.3)])
    for part, name in places.items():
        assert torch.equal(getattr(pipe, part).state_dict()[name], before[part])
    with pytest.raises(distorch.SpecError, match="there is no part 'transformer'"):
        set_pipeline_loras(pipe, [(state, 1.0, "transformer")])
    with pytest.raises(distorch.SpecError, match="expected .file or state dict, strength"):
        set_pipeline_loras(pipe, [state])


def test_a_failure_in_one_part_puts_all_loras_back(folders, tmp_path, monkeypatch):
    """With the mode that each part had; LoRAs that were put on a part alone count, too."""
    folder, _ = folders(tiny.stable_diffusion)
    state, places = loras(resident(folder))
    pipe = load_pipeline(folder, **DISK)
    distorch.set_loras(pipe.text_encoder, [({k: v for k, v in state.items() if "_te_" in k}, 0.7)])
    before = {part: getattr(pipe, part).state_dict()[name].clone() for part, name in places.items()}
    from distorch.integrations import pipeline

    real, calls = pipeline.set_loras, []

    def fails(module, *args, **options):
        calls.append(module)
        if module is pipe.unet:
            raise KeyboardInterrupt
        return real(module, *args, **options)

    monkeypatch.setattr(pipeline, "set_loras", fails)
    with pytest.raises(KeyboardInterrupt):
        set_pipeline_loras(pipe, [(state, 0.2)], lora_mode="fetch")
    assert pipe.text_encoder in calls
    for part, name in places.items():
        assert torch.equal(getattr(pipe, part).state_dict()[name], before[part])
    known = pipe.text_encoder.__dict__["_distorch"].patching
    assert known.options.mode == "merge"
    monkeypatch.setattr(pipeline, "set_loras", real)
    set_pipeline_loras(pipe, [])
    assert distorch.report(pipe.text_encoder).loras == []
    plain = resident(folder).text_encoder.state_dict()[places["text_encoder"]]
    assert torch.equal(pipe.text_encoder.state_dict()[places["text_encoder"]], plain)


def test_strict_is_asked_each_time(folders):
    folder, _ = folders(tiny.stable_diffusion)
    state, _ = loras(resident(folder))
    more = {**state, "lora_te2_x.lora_down.weight": torch.zeros(2, 8),
            "lora_te2_x.lora_up.weight": torch.zeros(8, 2)}  # fmt: skip
    pipe = load_pipeline(folder, loras=[(more, 1.0)], strict_loras=False, **DISK)
    with pytest.raises(distorch.FormatError, match="text_encoder_2"):
        set_pipeline_loras(pipe, [(more, 1.0)])


def test_which_part_a_lora_is_for():
    from distorch.integrations.lora_parts import LoraSplitter

    def parts_of(parts, prefix):
        key = f"{prefix}down_blocks_0_x.lora_down.weight"
        shares = LoraSplitter(parts).split([({key: torch.zeros(2, 2)}, 1.0)])
        return [name for name, loras in shares.items() if loras]

    assert parts_of(["controlnet", "text_encoder", "unet", "vae"], "lora_unet_") == ["unet"]
    assert parts_of(["motion_adapter", "unet"], "") == ["unet"]
    flux = ["text_encoder", "text_encoder_2", "transformer"]
    assert parts_of(flux, "lora_te3_") == ["text_encoder_2"]
    assert parts_of([*flux, "text_encoder_3"], "lora_te3_") == ["text_encoder_3"]
    assert parts_of(["transformer", "transformer_2"], "transformer.") == ["transformer"]


# --- what diffusers' own methods do ---


@pytest.mark.parametrize(
    "call",
    [lambda p: p.enable_model_cpu_offload(), lambda p: p.enable_sequential_cpu_offload(),
     lambda p: p.enable_group_offload(onload_device=torch.device("cpu"))],
)  # fmt: skip
def test_other_ways_of_offloading_say_what_to_do(folders, call):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    with pytest.raises(distorch.PlacementError, match="Leave the call out.*distribute_pipeline"):
        call(pipe)
    assert pipeline_report(pipe).ok


def test_to(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    wanted = small(pipe)
    assert pipe.to("cpu") is pipe
    for device in ("meta", "cuda"):
        with pytest.raises(distorch.PlacementError, match="cannot move"):
            pipe.to(device)
    assert torch.equal(small(pipe), wanted)
    pipe.to(torch.float32)
    assert torch.equal(small(pipe), small(resident(folder).to(torch.float32)))
    assert pipeline_report(pipe).bytes["disk"] > 0


def test_tiling_callbacks_and_other_pipelines_of_the_same_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe, plain = load_pipeline(folder, **DISK), resident(folder)
    seen = []
    for each in (pipe, plain):
        each.vae.enable_tiling()
        each.vae.enable_slicing()
        each.vae.tile_latent_min_size = 4
        options = {"callback_on_step_end": lambda p, i, t, kept: seen.append(i) or kept}
        each.picture = draw(each, height=32, width=32, num_images_per_prompt=2, **options)
    assert torch.equal(pipe.picture, plain.picture)
    assert seen == [0, 1, 0, 1]
    image = pipe.picture[:1]
    to_image = diffusers.StableDiffusionImg2ImgPipeline
    results = [
        draw(to_image.from_pipe(each, torch_dtype=torch.bfloat16), image=image, strength=1.0)
        for each in (pipe, plain)
    ]
    assert torch.equal(*results)
    assert distorch.is_sharded(pipe.unet.conv_in.weight)


def test_adapters_of_diffusers(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe, plain = load_pipeline(folder, **DISK), resident(folder)
    state, _ = loras(plain)
    pictures = []
    for each in (pipe, plain):
        each.load_lora_weights({k: v for k, v in state.items() if "_unet_" in k}, adapter_name="a")
        pictures.append(small(each))
        each.unload_lora_weights()
        pictures.append(small(each))
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], pictures[3])
    assert not torch.equal(pictures[0], pictures[1])


def test_pipelines_of_the_same_parts_know_where_they_are(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    state, places = loras(resident(folder))
    for other in (
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16),
        diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
    ):
        report = pipeline_report(other)
        assert report.ok
        assert report.bytes == pipeline_report(pipe).bytes
        with pytest.raises(distorch.PlacementError, match="Leave the call out"):
            other.enable_model_cpu_offload()
        set_pipeline_loras(other, [(state, 0.5)])
        assert "LoRA" in str(pipeline_report(pipe))
        set_pipeline_loras(other, [])


def test_compiled_and_plain_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    wanted = pipeline_report(pipe).bytes
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert pipeline_report(pipe).bytes == wanted
    distorch.undistribute(pipe.vae)
    report = pipeline_report(pipe)
    assert report.ok
    assert report.plain["vae"]["cpu"] > 0
    assert "vae (not distributed)" in str(report)
    set_pipeline_loras(pipe, [])
    undistribute_pipeline(pipe)
    assert not any(distorch.is_sharded(p) for m in models(pipe).values() for p in m.parameters())
    with pytest.raises(distorch.PlacementError, match="is not distributed"):
        pipeline_report(pipe)
    assert "enable_model_cpu_offload" not in pipe.__dict__


def test_a_pipeline_that_accelerate_offloads(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = resident(folder)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(distorch.PlacementError, match=r"accelerate offloads.*remove_all_hooks\(\)"):
        distribute_pipeline(pipe, "cpu,0b;disk,*")
    with pytest.raises(distorch.PlacementError, match="accelerate offloads it"):
        distorch.distribute(pipe.unet, "cpu,0b;disk,*")


def test_adapters_of_both(folders):
    """A LoRA that diffusers has put on stays on top of ours: that is said."""
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    state, _ = loras(resident(folder))
    of_unet = {k: v for k, v in state.items() if "_unet_" in k}
    pipe.load_lora_weights(of_unet, adapter_name="mine")
    with pytest.warns(UserWarning, match=r"has adapters of PEFT \(mine\), which stay on"):
        set_pipeline_loras(pipe, [(of_unet, 1.0)])
    assert len(str(pipeline_report(pipe)).splitlines()) < 25
    pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_pipeline_loras(pipe, [])


def test_a_new_placement_has_to_be_given(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    with pytest.raises(distorch.SpecError, match="give a placement"):
        distribute_pipeline(pipe, keep=["vae.*"])
    assert pipeline_report(pipe).parts["vae"].bytes["disk"] > 0


def test_saving(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    load_pipeline(folder, **DISK).save_pretrained(tmp_path / "saved")
    assert_same(resident(tmp_path / "saved"), resident(folder))


def test_a_pipeline_that_exists(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = resident(folder)
    wanted = small(pipe)
    with pytest.raises(
        distorch.PlacementError, match="is not distributed: load it with load_pipeline"
    ):
        pipeline_report(pipe)
    assert distribute_pipeline(pipe, "cpu,0b;disk,*", min_bytes=0, keep=["vae.*"]) is pipe
    assert pipeline_report(pipe).parts["vae"].bytes["cpu"] > 0
    assert torch.equal(small(pipe), wanted)
    distribute_pipeline(pipe, "cpu,40kb;disk,*")  # min_bytes and keep stay as they were
    report = pipeline_report(pipe)
    assert set(report.parts["vae"].bytes) == {"cpu"}
    for part in PARTS:
        distorch.undistribute(getattr(pipe, part))
    assert torch.equal(small(pipe), wanted)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_error_half_way_puts_all_parts_back(folders, monkeypatch, distributed):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = (
        load_pipeline(folder, "cpu,40kb;disk,*", min_bytes=0) if distributed else resident(folder)
    )
    wanted = small(pipe)
    before = pipeline_report(pipe).bytes if distributed else None
    from distorch.integrations import pipeline

    real, calls = pipeline.api.distribute, []

    def fails(module, *args, **options):
        calls.append(module)
        if len(calls) == 3:
            raise distorch.FetchError("the donor is gone")
        return real(module, *args, **options)

    monkeypatch.setattr(pipeline.api, "distribute", fails)
    with pytest.raises(distorch.FetchError, match="the donor is gone"):
        distribute_pipeline(pipe, "cpu,10kb;disk,*", min_bytes=0)
    assert len(calls) >= 3
    if distributed:
        assert pipeline_report(pipe).ok
        assert pipeline_report(pipe).bytes == before
    else:
        sharded = [distorch.is_sharded(p) for m in models(pipe).values() for p in m.parameters()]
        assert not any(sharded)
    assert torch.equal(small(pipe), wanted)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"files": {"unit": "x.safetensors"}}, "the pipeline has no such part; did you mean 'unet'"),
        ({"files": {"unet": "none.safetensors"}}, "none.safetensors.*no such file"),
        ({"dtype": {"unit": torch.float16}}, "there is no such part; expected 'default' or.*unet"),
        ({"dtype": "int8"}, "computes in float32, float16 or bfloat16"),
        ({"config": "somewhere"}, "config='somewhere' goes with one file"),
        ({"spec": "cpu,lots"}, "'lots' is not a share"),
        ({"spec": None, "virtual_vram": "1kb", "donor": "dosk"}, "unknown device 'dosk'"),
        ({"torch_dtype": torch.float16}, "here it is called dtype="),
        ({"device_map": "auto"}, "a placement says where weights go"),
        ({"safety_checker": None}, "components="),
        ({"strict": True}, "there is no option strict="),
        ({"component": {}}, "did you mean components="),
        ({"cls": "FluxPipelines"}, "is none that this version of diffusers has"),
        ({"keeps": ["unet.*"]}, "there is no option keeps=; did you mean keep=?"),
        ({"progress": 3}, "progress=3"),
        ({"loras": "style.safetensors"}, "expected"),
        ({"components": {"text_encodr": None}}, "no such part; did you mean 'text_encoder'?"),
        ({"lora_mode": "lazy"}, "lora_mode='lazy'"),
        ({"spec": "cuda:7,1gb;cpu,*"}, "this machine has"),
    ],
)  # fmt: skip
def test_wrong_options(folders, options, said):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pipeline(folder, **{**DISK, **options})


def test_what_is_wrong_is_said_before_a_file_is_opened(tmp_path):
    for options in ({"spec": "cpu,lots"}, {"lora_mode": "lazy"}, {"resident": "wide"}):
        with pytest.raises(distorch.SpecError):
            load_pipeline(tmp_path / "nowhere", **{**DISK, **options})


def test_dtypes_by_part(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, dtype={"vae": torch.float32, "default": "auto"}, **DISK)
    assert pipe.vae.dtype is torch.float32
    assert pipe.unet.dtype is pipe.text_encoder.dtype is torch.bfloat16
    assert load_pipeline(folder, dtype={"vae": "float16"}, **DISK).unet.dtype is torch.float32


@pytest.mark.parametrize(
    ("index", "said"),
    [("[]", "expected a table of parts"), ("{", "is not JSON"),
     ('{"_class_name": ["pipeline", "Odd"]}', "give cls="),
     ('{"_class_name": "OddPipeline"}', "the pipeline 'OddPipeline' .*give cls=")],
)  # fmt: skip
def test_indexes_that_cannot_be_followed(folder, index, said):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pipeline(folder, **DISK)


def test_code_that_comes_with_a_part_is_not_run(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["odd", "OddModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "odd.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(distorch.SpecError, match=r"'unet' comes with code of its own .odd.py"):
        load_pipeline(folder, **DISK)


def test_a_broken_scheduler_leaves_given_parts_alone(folder):
    mine = resident(folder).unet
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(
        distorch.FormatError, match="diffusers cannot make a StableDiffusionPipeline"
    ):
        load_pipeline(folder, components={"unet": mine}, **DISK)
    assert not any(distorch.is_sharded(p) for p in mine.parameters())


def test_folders_that_are_no_pipelines(folder, tmp_path):
    with pytest.raises(distorch.FormatError, match=r"there is no model_index.json"):
        load_pipeline(tmp_path, **DISK)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(distorch.FormatError, match="vae: there are no weights in"):
        load_pipeline(folder, **DISK)
    shutil.rmtree(folder / "vae")
    with pytest.raises(distorch.FormatError, match="'vae', which model_index.json lists"):
        load_pipeline(folder, **DISK)


def test_what_is_meant_for_the_other_function(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.raises(distorch.FormatError, match="is a pipeline .*load_pipeline, or subfolder="):
        load_pretrained(folder, **DISK)
    with pytest.raises(distorch.FormatError, match="It is of a model of diffusers"):
        load_pretrained(folder / "unet", **DISK)
    with pytest.raises(distorch.FormatError, match="of one model .config.json.: load_pretrained"):
        load_pipeline(folder / "unet", **DISK)
    with pytest.raises(distorch.FormatError, match="is a file: expected a folder, or one file"):
        load_pipeline(folder / "model_index.json", **DISK)
    file = folder / "text_encoder" / "model.safetensors"
    with pytest.raises(distorch.FormatError, match="is a file: expected the folder that it is in"):
        load_pretrained(file, **DISK)


def test_a_damaged_part_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("DISTORCH_DISK", str(scratch))
    with pytest.raises(distorch.FormatError, match="vae: .*1 missing .decoder.conv_in.weight"):
        load_pipeline(folder, **DISK)
    assert list(scratch.iterdir()) == []
    assert torch.get_default_dtype() is torch.float32
