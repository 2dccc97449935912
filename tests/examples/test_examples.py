# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ run on tiny random checkpoints and agree with the resident model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_models as tiny

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_diffusers_pipeline(tmp_path, monkeypatch):
    folder, _ = tiny.save_pipeline(tiny.stable_diffusion, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = run("diffusers_pipeline.py", folder, "a lighthouse in the fog", "cpu,60kb;disk,*")
    assert "as planned" in text
    assert "disk" in text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_model(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    folder = tiny.save_language_model(config, tmp_path / "model")
    text = run("transformers_model.py", folder, "the capital of France is", "cpu,10kb;disk,*")
    assert text.startswith("the capital of France is")
    assert "as planned" in text


@pytest.mark.parametrize("script", ["diffusers_pipeline.py", "transformers_model.py"])
def test_how_they_are_called(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"python examples/{script} MODEL PROMPT" in done.stderr
