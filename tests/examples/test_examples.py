"""The scripts of examples/ run on tiny random checkpoints and agree with the resident model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples import tiny

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan, tiny.qwen_image], ids=lambda f: f.__name__)
def test_diffusers_pipeline(tmp_path, make):
    folder, arguments = tiny.save_pipeline(make, tmp_path)
    out = tmp_path / "out.webp"
    text = run(
        "diffusers_pipeline.py", folder, "a lighthouse in the fog", "--spec=cpu,0b;disk,*",
        "--min-bytes=0", "--steps=2", f"--out={out}", "--compare", *arguments,
    )  # fmt: skip
    assert "bits agree" in text
    assert "as planned" in text
    assert "disk" in text
    assert out.read_bytes().startswith(b"RIFF")


def configurations():
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "llama": LlamaConfig(**small),
        "qwen3 tied": Qwen3Config(**small, tie_word_embeddings=True),
        "gpt2": GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    }


@pytest.mark.parametrize("mode", [[], ["--in-memory"]], ids=["streamed", "in memory"])
@pytest.mark.parametrize("name", ["llama", "qwen3 tied", "gpt2"])
def test_transformers_model(tmp_path, name, mode):
    folder = tiny.save_language_model(configurations()[name], tmp_path / "model")
    text = run(
        "transformers_model.py", folder, "the capital of France is", "--spec=cpu,0b;disk,*",
        "--min-bytes=0", "--new-tokens=4", "--compare", *mode,
    )  # fmt: skip
    assert "bits agree" in text
    assert "as planned" in text
