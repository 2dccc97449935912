# SPDX-License-Identifier: Apache-2.0
"""A model larger than memory, streamed from disk: distorch beside the raw read of the same bytes,
the resident model's compute, a memory-mapped model and accelerate's disk_offload.

Every variant is a process of its own, held to the same memory (page cache included) where that is
the point; steps are interleaved, the page cache is emptied before each, medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from _workers import MemoryLimit, Worker, answer, drop_page_cache, questions
from safetensors import safe_open
from torch import Tensor, nn

WIDTH, HIDDEN, HEADS = 2560, 6912, 20
GIB = 1 << 30


class Block(nn.Module):
    """A Llama-like block: 12 * width^2 weights, 157 MB in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, width]."""
        h = self.norm1(x)
        q, k, v = (
            f(h).view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for f in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(0, 1).reshape(-1, WIDTH))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def stack(depth: int) -> nn.Sequential:
    """The model without weights."""
    with torch.device("meta"):
        return nn.Sequential(*(Block() for _ in range(depth))).bfloat16().requires_grad_(False)


def write_checkpoint(path: Path, depth: int) -> None:
    """A safetensors file, block by block, so that the writer needs no memory for it."""
    model, generator = stack(depth), torch.Generator().manual_seed(0)
    header, offset = {}, 0
    for name, p in model.named_parameters():
        end = offset + p.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for p in model.parameters():
            values = torch.empty(p.shape, dtype=torch.bfloat16)
            if p.dim() == 1:
                values.fill_(1)
            else:
                values.normal_(0, p.shape[1] ** -0.5, generator=generator)
            file.write(values.view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def digest(x: Tensor) -> str:
    """The bits of the output, to be compared."""
    return str(x.contiguous().view(torch.int16).long().sum().item())


def load_ours(path: str, depth: int, spec: str, *, verify: bool = False):
    import distorch

    model = distorch.load(stack(depth), path, spec, verify=verify, progress=False)
    assert distorch.report(model).ok
    return model


def load_resident(path: str, depth: int, spec: str):
    from safetensors.torch import load_file

    model = stack(depth)
    model.load_state_dict(load_file(path), assign=True)
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def load_mapped(path: str, depth: int, spec: str):
    """Weights are views of one map of the file: the kernel pages them in."""
    model = stack(depth)
    with safe_open(path, framework="pt") as file:
        header = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    with Path(path).open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        entries = json.loads(raw.read(length))
    size = Path(path).stat().st_size
    data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    state = {}
    for name, shape in header.items():
        begin, end = (8 + length + o for o in entries[name]["data_offsets"])
        state[name] = data[begin:end].view(torch.bfloat16).view(shape)
    model.load_state_dict(state, assign=True)
    return model


def load_accelerate(path: str, depth: int, spec: str):
    from accelerate import disk_offload
    from accelerate.utils import offload_weight, save_offload_index

    model = stack(depth)
    folder = Path(path).with_suffix(".accelerate")
    index_file = folder / "index.json"
    if not index_file.exists():
        folder.mkdir(exist_ok=True)
        index: dict = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                index = offload_weight(file.get_tensor(name), name, str(folder), index)
        save_offload_index(index, str(folder))
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


LOADERS = {
    "distorch": load_ours,
    "verified": partial(load_ours, verify=True),
    "resident": load_resident,
    "mmap": load_mapped,
    "accelerate": load_accelerate,
}


def model_worker(options: argparse.Namespace) -> None:
    """Runs one step for each question."""
    model = LOADERS[options.worker](options.checkpoint, options.depth, options.spec)
    answer(ready=True)
    with torch.inference_mode():
        for question in questions():
            x = torch.randn(question["tokens"], WIDTH, generator=torch.Generator().manual_seed(1))
            x = x.bfloat16()
            start = time.perf_counter()
            out = model(x)
            seconds = time.perf_counter() - start
            values = {"seconds": seconds, "digest": digest(out)}
            if options.worker == "distorch":
                import distorch

                values["stats"] = vars(distorch.stats(model))
                distorch.reset_stats(model)
            answer(**values)


def raw_worker(options: argparse.Namespace) -> None:
    """Reads the first bytes of the file unbuffered, with the threads and size that do best here."""
    import mmap

    fd = os.open(options.checkpoint, os.O_RDONLY | os.O_DIRECT)
    buffers = [mmap.mmap(-1, 8 << 20) for _ in range(16)]

    def read(nbytes: int, threads: int, chunk: int) -> float:
        position, lock = [0], threading.Lock()

        def work(buffer: mmap.mmap) -> None:
            view = memoryview(buffer)[:chunk]
            while True:
                with lock:
                    at, position[0] = position[0], position[0] + chunk
                if at >= nbytes:
                    return
                os.preadv(fd, [view], at)

        start = time.perf_counter()
        workers = [threading.Thread(target=work, args=(buffers[i],)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    shapes = [(threads, chunk << 20) for threads in (2, 4, 8) for chunk in (1, 2, 4)]
    tried = {shape: min(read(1 << 30, *shape) for _ in range(2)) for shape in shapes}
    best = min(tried, key=lambda shape: tried[shape])
    answer(ready=True, threads=best[0], chunk=best[1])
    for question in questions():
        answer(seconds=read(question["nbytes"], *best))


def measure(options: argparse.Namespace, checkpoint: Path) -> dict:
    """All variants, interleaved."""
    script, common = __file__, ["--depth", str(options.depth), "--spec", options.spec]
    total = checkpoint.stat().st_size
    # Mapped pages survive drop_page_cache(): the mapped model gets a file of its own, or the
    # others would find half of theirs cached.
    own_file = checkpoint.with_name("mapped.safetensors")
    shutil.copyfile(checkpoint, own_file)

    def worker(name: str, limited: bool) -> Worker:
        limit = MemoryLimit(int(options.memory_gib * GIB)) if limited else None
        file = own_file if name == "mmap" else checkpoint
        return Worker(script, [*common, "--checkpoint", str(file), "--worker", name], limit)

    names = ["distorch", "verified", "mmap", "accelerate", "resident"]
    workers = {name: worker(name, limited=name != "resident") for name in names}
    raw = worker("raw", False)
    runs = []
    for tokens in options.tokens:
        for round_ in range(options.rounds + 1):
            row: dict = {"tokens": tokens, "warm_up": round_ == 0}
            order = names[round_ % len(names) :] + names[: round_ % len(names)]
            for name in order:  # nobody always runs after the same other
                drop_page_cache()
                row[name] = workers[name].ask(tokens=tokens)
            streamed = row["distorch"]["stats"]["bytes"]["disk->cpu"]
            row["raw"] = raw.ask(nbytes=streamed)
            row["raw_all"] = raw.ask(nbytes=total)
            assert len({row[name]["digest"] for name in workers}) == 1, "bits differ"
            print(
                {k: round(v["seconds"], 3) for k, v in row.items() if isinstance(v, dict)},
                flush=True,
            )
            runs.append(row)
    peaks = {name: child.limit.peak() for name, child in workers.items() if child.limit}
    for child in (*workers.values(), raw):
        child.close()
    return {"runs": runs, "peaks": peaks, "raw": raw.ready, "file_bytes": total}


def summarise(result: dict, tokens: list[int]) -> list[dict]:
    """Medians, and the step over max(resident compute, raw read of the streamed bytes)."""
    rows = []
    for count in tokens:
        kept = [r for r in result["runs"] if r["tokens"] == count and not r["warm_up"]]
        names = [name for name in kept[0] if isinstance(kept[0][name], dict)]
        median = {n: statistics.median(r[n]["seconds"] for r in kept) for n in names}
        floor = max(median["resident"], median["raw"])
        ratio = {n: median[n] / floor for n in ("distorch", "verified", "mmap", "accelerate")}
        rows.append(
            {"tokens": count, "median_seconds": median, "floor_seconds": floor, "ratio": ratio}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=20, help="blocks of 157 MB (default 20)")
    parser.add_argument("--spec", default="cpu,600mb;disk,*")
    parser.add_argument("--memory-gib", type=float, default=1.4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        (raw_worker if options.worker == "raw" else model_worker)(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint = Path(folder) / "stack.safetensors"
        print(f"writing {options.depth} blocks", flush=True)
        write_checkpoint(checkpoint, options.depth)
        result = measure(options, checkpoint)
    result["summary"] = summarise(result, options.tokens)
    named = ("depth", "spec", "memory_gib", "rounds")
    result["settings"] = {name: getattr(options, name) for name in named}
    result["machine"] = {"cpus": os.cpu_count(), "torch": torch.__version__}
    for row in result["summary"]:
        print(json.dumps(row))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
