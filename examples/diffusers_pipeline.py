"""A diffusers pipeline (FLUX, Wan, Qwen-Image, ...) with its large parts on donors.

    python examples/diffusers_pipeline.py black-forest-labs/FLUX.1-dev "a lighthouse in fog" \\
        --spec "cuda:0,5gb;cpu,*" --lora style.safetensors=0.8 --out lighthouse.png

MODEL is a folder in diffusers' layout or the name of a repository on the hub. Transformers are
streamed from their files, LoRAs are merged on the way; text encoders are loaded by their own
library and then distributed. `--compare` runs the resident pipeline too and compares every bit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline

import distorch

TRANSFORMERS = ("transformer", "transformer_2", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def local_folder(model: str) -> Path:
    """The pipeline's folder; downloaded when MODEL is not one."""
    if Path(model).is_dir():
        return Path(model)
    return Path(DiffusionPipeline.download(model))


def parse_lora(text: str) -> tuple[str, float]:
    """ "file.safetensors=0.8" -> (file, strength); strength 1 when it is not given."""
    path, _, strength = text.rpartition("=") if "=" in text else (text, "", "1")
    return path, float(strength)


def parts_of(folder: Path) -> dict:
    """Part -> (library, class name), and "_class_name" of the pipeline."""
    return json.loads((folder / "model_index.json").read_text())


def kept_in_float32(module: torch.nn.Module) -> set[str]:
    """Names of the weights that diffusers keeps in float32 whatever the dtype asked for."""
    steps = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return {name for name, _ in module.named_parameters() if steps & set(name.split("."))}


def streamed(arguments: argparse.Namespace, folder: Path, name: str) -> torch.nn.Module:
    """One transformer: built without weights, filled from its files, each weight to its place."""
    cls = getattr(diffusers, parts_of(folder)[name][1])
    with init_empty_weights(include_buffers=False):
        module = cls.from_config(cls.load_config(folder, subfolder=name))
    loras = [parse_lora(text) for text in arguments.lora]
    module = distorch.load(
        module.eval(), folder / name, arguments.spec, loras=loras, min_bytes=arguments.min_bytes
    )
    wide, dtype = kept_in_float32(module), getattr(torch, arguments.dtype)
    for weight_name, weight in module.named_parameters():
        if weight_name in wide:
            weight.data = weight.data.float()
        elif weight.dtype is not dtype:
            raise SystemExit(
                f"{folder / name} holds {weight.dtype}, --dtype is {dtype}: give the file's dtype"
            )
    # What was made float32 is resident now: back to its place.
    return distorch.redistribute(module, arguments.spec) if wide else module


def build(arguments: argparse.Namespace, folder: Path) -> DiffusionPipeline:
    """The pipeline with its transformers and text encoders distributed."""
    parts = parts_of(folder)
    streams = {
        name: streamed(arguments, folder, name)
        for name in TRANSFORMERS
        if parts.get(name, [None])[0] is not None
    }
    pipeline = resident(arguments, folder, **streams)
    for name in TEXT_ENCODERS:
        if getattr(pipeline, name, None) is not None:
            module = getattr(pipeline, name)
            distorch.distribute(module, arguments.spec, min_bytes=arguments.min_bytes)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.to(distorch.report(next(iter(streams.values()))).compute)
    return pipeline


def resident(arguments: argparse.Namespace, folder: Path, **given) -> DiffusionPipeline:
    """The pipeline as diffusers builds it, but for the parts that are given."""
    cls = getattr(diffusers, parts_of(folder)["_class_name"])
    return cls.from_pretrained(folder, torch_dtype=getattr(torch, arguments.dtype), **given)


def run(pipeline: DiffusionPipeline, arguments: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """Images or frames as diffusers returns them (output_type "pt"), and the seconds it took."""
    settings = {
        "height": arguments.height, "width": arguments.width, "num_frames": arguments.frames,
        "num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance,
        "max_sequence_length": arguments.max_tokens,
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.perf_counter()
    out = pipeline(prompt=arguments.prompt, generator=generator, output_type="pt", **given)
    return (out.images if hasattr(out, "images") else out.frames), time.perf_counter() - start


def save(pictures: torch.Tensor, path: Path) -> None:
    """One image as any format that Pillow knows; frames [1, n, 3, h, w] as an animation."""
    from PIL import Image

    frames = pictures[0] if pictures.dim() == 5 else pictures[:1]
    arrays = (255 * frames.float().clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    images = [Image.fromarray(array.numpy()) for array in arrays]
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"save_all": True, "append_images": images[1:], "duration": 62} if images[1:] else {}
    images[0].save(path, **more)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt")
    parser.add_argument("--spec", default="auto", help="placement of each large part")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[=STRENGTH]")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--min-bytes", type=int, default=1 << 20)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int, help="for video pipelines")
    parser.add_argument("--max-tokens", type=int, help="longest prompt, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out.png"), help=".webp for video")
    parser.add_argument("--compare", action="store_true", help="also resident, bit for bit")
    arguments = parser.parse_args()
    if arguments.compare and arguments.lora:
        parser.error("--compare needs a pipeline without --lora")
    folder = local_folder(arguments.model)
    with torch.inference_mode():
        pipeline = build(arguments, folder)
        pictures, seconds = run(pipeline, arguments)
        save(pictures, arguments.out)
        for name in (*TRANSFORMERS, *TEXT_ENCODERS):
            if getattr(pipeline, name, None) is not None:
                print(name, distorch.report(getattr(pipeline, name)), sep="\n", end="\n\n")
        print(f"distributed: {seconds:.2f} s, {arguments.out}")
        if arguments.compare:
            wanted, plain_seconds = run(resident(arguments, folder).to(pictures.device), arguments)
            same = torch.equal(pictures, wanted)
            print(f"resident: {plain_seconds:.2f} s, bits {'agree' if same else 'DIFFER'}")
            raise SystemExit(not same)


if __name__ == "__main__":
    main()
