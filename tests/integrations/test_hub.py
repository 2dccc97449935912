# SPDX-License-Identifier: Apache-2.0
"""Ids of the hub: what lies whole in the local cache is taken, the rest is downloaded or refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

import distorch
from distorch.integrations import load_pipeline, load_pretrained
from tests import tiny_models as tiny
from tests.hub_cache import put

DISK = {"spec": "cpu,0b;disk,*", "min_bytes": 0}
ID = "somebody/model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def online(cache, monkeypatch):
    """A hub that has one repository; gives the patterns that were asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    real, asked = huggingface_hub.snapshot_download, []

    def download(name, *, revision=None, local_files_only=False, allow_patterns=None, **others):
        if local_files_only:
            return real(name, revision=revision, local_files_only=True, **others)
        asked.append(allow_patterns)
        return str(put(cache, name, cache.parent / "online"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files",
        lambda *a, **k: [str(p.relative_to(cache.parent / "online"))
                         for p in (cache.parent / "online").rglob("*") if p.is_file()],
    )  # fmt: skip
    return asked


def llama(folder, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, **options)
    return model


def bits(model):
    return model(torch.tensor([[1, 2, 3]])).logits


def test_from_the_cache_by_revision(cache, tmp_path):
    models = {}
    for seed, revision in enumerate(("main", "v2")):
        models[revision] = llama(tmp_path / revision, seed)
        put(cache, ID, tmp_path / revision, str(seed) * 40, revision)
    for revision in (None, "v2"):
        found = load_pretrained(ID, revision=revision, **DISK)
        assert torch.equal(bits(found), bits(models[revision or "main"]))


def test_a_subfolder(cache, tmp_path):
    model = llama(tmp_path / "all" / "encoder")
    put(cache, ID, tmp_path / "all")
    assert torch.equal(bits(load_pretrained(ID, subfolder="encoder", **DISK)), bits(model))
    with pytest.raises(distorch.FormatError, match="no config.json"):
        load_pretrained(ID, subfolder="decoder", **DISK)


def remove_shard(folder):
    next(folder.glob("model-00002*")).unlink()
    return r"model-00002.*is missing"


def remove_weights(folder):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    return "there are no weights"


@pytest.mark.parametrize("damage", [remove_shard, remove_weights])
def test_an_interrupted_download_is_no_model(cache, tmp_path, damage):
    llama(tmp_path / "m", max_shard_size="20KB")
    said = damage(tmp_path / "m")
    put(cache, ID, tmp_path / "m")
    with pytest.raises(distorch.FormatError, match=rf"{ID}.*{said}.*HF_HUB_OFFLINE.*cache is"):
        load_pretrained(ID, **DISK)


def test_what_is_not_there(cache):
    with pytest.raises(distorch.FormatError, match="it is not in the cache.*Give the folder"):
        load_pretrained(ID, **DISK)
    with pytest.raises(distorch.FormatError, match="it is not in the cache"):
        load_pipeline(ID, **DISK)
    for text in ("./no/such/folder", "a/b/c", "model.safetensors"):
        with pytest.raises(distorch.FormatError, match="no such file or folder, and it is no id"):
            load_pretrained(text, **DISK)
    for odd in ("", None, 3):
        with pytest.raises(distorch.SpecError, match="expected a folder, a file, or an id"):
            load_pretrained(odd, **DISK)


def test_a_download_brings_what_is_read_and_no_more(online, tmp_path):
    model = llama(tmp_path / "online")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors"):
        path = tmp_path / "online" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"for another program")
    assert torch.equal(bits(load_pretrained(ID, **DISK)), bits(model))
    assert [p for p in online[0] if "*" not in p] == ["model.safetensors"]
    load_pretrained(ID, **DISK)
    assert len(online) == 1  # now it is in the cache


def test_one_of_several_gguf_files_has_to_be_chosen(online, tmp_path):
    """They are kinds of one model, of many gigabytes each."""
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf", "big-00001-of-00002.gguf"):
        path = tmp_path / "online" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
    with pytest.raises(distorch.FormatError, match=r"has 3 GGUF files .*choose one with file="):
        load_pretrained(ID, **DISK)
    assert online == []
    for file, pattern in (
        ("model-Q8_0.gguf", "model-Q8_0.gguf"),
        ("big-00001-of-00002.gguf", "big-*-of-00002.gguf"),
    ):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        (tmp_path / "hub").mkdir()
        with pytest.raises(distorch.FormatError):  # no real file
            load_pretrained(ID, file=file, **DISK)
        assert [p for p in online[-1] if p.endswith(".gguf")] == [pattern]


def test_a_download_that_fails(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def fails(*args, **kwargs):
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fails)
    with pytest.raises(
        distorch.FormatError, match=r"ConnectionError: the line is dead\).*HF_TOKEN"
    ):
        load_pretrained(ID, **DISK)


def test_a_pipeline_from_the_cache(cache, tmp_path):
    folder, _ = tiny.save_pipeline(tiny.stable_diffusion, tmp_path)
    snapshot = put(cache, ID, folder)
    pipe = load_pipeline(ID, **DISK)
    assert distorch.is_sharded(pipe.unet.conv_in.weight)
    index = json.loads((snapshot / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(distorch.FormatError, match="unet: there are no weights.*HF_HUB_OFFLINE"):
        load_pipeline(ID, **DISK)


def test_neither_library_is_imported_before_it_is_needed():
    import subprocess
    import sys

    program = (
        "import sys, distorch.integrations;"
        "print([n for n in ('diffusers', 'transformers', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
