"""A causal language model of transformers with its weights on donors.

    python examples/transformers_model.py Qwen/Qwen3-8B "The capital of France is" \\
        --spec "cuda:0,6gb;cpu,*"

MODEL is a folder or the name of a repository on the hub. Its safetensors files are streamed, each
weight straight to its place. Some architectures rename weights when transformers reads them; for
these (the error says that the names do not fit) add `--in-memory`: transformers loads the model,
then it is distributed. `--compare` generates with the resident model too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import distorch


def local_folder(model: str) -> Path:
    """The model's folder; downloaded when MODEL is not one."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return Path(snapshot_download(model, allow_patterns=kinds))


def streamed(folder: Path, spec: str, min_bytes: int) -> torch.nn.Module:
    """Built without weights, filled from the files."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return distorch.load(model.eval(), folder, spec, min_bytes=min_bytes, strict=False)


def in_memory(folder: Path, spec: str, min_bytes: int) -> torch.nn.Module:
    """Loaded by transformers, then distributed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return distorch.distribute(model, spec, min_bytes=min_bytes)


def generate(model: torch.nn.Module, tokens: dict, count: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens [1, prompt + count], and the seconds it took."""
    start = time.perf_counter()
    out = model.generate(**tokens, max_new_tokens=count, do_sample=False)
    return out, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt")
    parser.add_argument("--spec", default="auto", help="placement, for example 'cpu,4gb;disk,*'")
    parser.add_argument("--min-bytes", type=int, default=1 << 20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--in-memory", action="store_true", help="let transformers load it first")
    parser.add_argument("--compare", action="store_true", help="also resident, token and bit")
    arguments = parser.parse_args()
    folder = local_folder(arguments.model)
    build = in_memory if arguments.in_memory else streamed
    with torch.inference_mode():
        model = build(folder, arguments.spec, arguments.min_bytes)
        compute = distorch.report(model).compute
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(arguments.prompt, return_tensors="pt").to(compute)
        out, seconds = generate(model, tokens, arguments.new_tokens)
        print(tokenizer.decode(out[0], skip_special_tokens=True))
        print(distorch.report(model), distorch.stats(model), sep="\n\n")
        print(f"distributed: {seconds:.2f} s")
        if arguments.compare:
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(compute)
            wanted, plain_seconds = generate(plain, tokens, arguments.new_tokens)
            same = torch.equal(out, wanted) and torch.equal(
                model(**tokens).logits, plain(**tokens).logits
            )
            print(f"resident: {plain_seconds:.2f} s, bits {'agree' if same else 'DIFFER'}")
            raise SystemExit(not same)


if __name__ == "__main__":
    main()
