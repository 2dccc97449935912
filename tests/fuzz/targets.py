# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: each target takes bytes, and may raise nothing but errors of distorch.

A target asserts what must hold of good and bad input. `seeds` are inputs that come far.
"""

import atexit
import json
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import distorch
from distorch.errors import DistorchError, FetchError, FormatError
from distorch.formats import unchanged
from distorch.formats.checkpoint import open_checkpoint
from distorch.lora.files import read_lora
from distorch.machine import links
from distorch.planner import DeviceInfo, parse_spec
from distorch.planner.spec import parse_bytes
from distorch.timeline import Timeline
from tests.fuzz import formats
from tests.fuzz.choices import Choices

warnings.simplefilter("ignore")
_SMALL = 1 << 20  # bytes of tensors that are read whole
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.float8_e4m3fn,
    torch.int32, torch.int64, torch.bool, torch.float64,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """`words` are what a fuzzer puts together where it finds no way by itself."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]] = field(default=lambda: [b""])
    words: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {}


def _target(name: str, seeds: Callable[[], Iterable[bytes]], words: Iterable[str] = ()):
    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[name] = Target(run, seeds, tuple(words))
        return run

    return register


@cache
def _folder() -> Path:
    """A folder of this process, in memory where there is one."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{os.getpid()}-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, data: bytes) -> Path:
    """A new file each time: the library remembers open ones by what they are."""
    path = _folder() / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _check_checkpoint(path: Path) -> None:
    """What opens lies in the file, and can be read, planned and loaded; what does not is named."""
    size = path.stat().st_size
    try:
        checkpoint = open_checkpoint(path)
        for name, tensor in checkpoint.tensors.items():
            if tensor.in_one_range:
                assert tensor.offset >= 0 and tensor.nbytes >= 0, name
                assert tensor.offset + tensor.nbytes <= size, name
        if checkpoint.total_bytes < _SMALL:
            for tensor in checkpoint.tensors.values():
                with suppress(DistorchError):  # a kind of tensor that cannot be read
                    tensor.read()
        distorch.plan(path, "cpu,50%;disk,*", min_bytes=0)
    except FormatError as error:
        assert path.name in str(error) or "'" in str(error), error
    except DistorchError:
        pass


# --- checkpoints ---


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(8, 32), "a.bias": torch.randn(8), "n": torch.tensor(3)}


def _header() -> bytes:
    whole = save(_tensors(), {"format": "pt"})
    return whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]


_HEADER_WORDS = (
    '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', "F32", "BF16", "F8_E4M3", "U8", "I64",
    "F4", "BOOL", ".comfy_quant", ".weight", ".scale_weight", "scaled_fp8", "_quantization_metadata",
    "[", "]", "{", "}", ":", ",", "-1", "18446744073709551615", "1e999", "null", "\\u0000",
)  # fmt: skip


@_target("safetensors", lambda: [save(_tensors()), save(_tensors(), {"a": "b"})], _HEADER_WORDS)
def safetensors_file(data: bytes) -> None:
    """Any bytes as a file."""
    _check_checkpoint(_file("m.safetensors", data))


@_target("safetensors-header", lambda: [_header()], _HEADER_WORDS)
def safetensors_header(data: bytes) -> None:
    """Any bytes as the header of a file that is right otherwise."""
    _check_checkpoint(_file("m.safetensors", formats.safetensors(data)))


@_target(
    "index",
    lambda: [
        b'{"metadata": {}, "weight_map": {"a.weight": "1.safetensors", "b": "2.safetensors"}}'
    ],
    ('"weight_map"', "1.safetensors", "2.safetensors", "../", "/", "\\u0000", "1", "{", "}", '""'),
)
def index(data: bytes) -> None:
    """Any bytes as the index of two files."""
    for number, name in (1, "a.weight"), (2, "b"):
        shard = _folder() / f"{number}.safetensors"
        if not shard.is_file():
            shard.write_bytes(save({name: torch.ones(4, 4)}))
    path = _file("model.safetensors.index.json", data)
    try:
        found = open_checkpoint(path)
        for tensor in found.tensors.values():
            assert Path(tensor.path).parent == _folder().resolve(), tensor.path
    except FormatError as error:
        assert path.name in str(error) or "safetensors" in str(error), error


def _gguf_seeds() -> Iterable[bytes]:
    from tests.gguf_files import Q, write_gguf

    for kind in Q.F32, Q.Q4_K, Q.Q8_0, Q.IQ4_XS:
        path = _folder() / "seed.gguf"
        with suppress(NotImplementedError):
            write_gguf(path, "flux", {"a.weight": torch.randn(2, 256), "b": torch.randn(8)}, kind)
            yield path.read_bytes()


@_target("gguf", _gguf_seeds, ("GGUF", "general.alignment", "split.count", "split.no", "\t\0\0\0"))
def gguf_file(data: bytes) -> None:
    """Any bytes as a file."""
    _check_checkpoint(_file("m.gguf", data))


@_target("gguf-made", lambda: [bytes(64), bytes(range(200)), bytes(range(255, 0, -1))])
def gguf_made(data: bytes) -> None:
    """Files with the form of GGUF and wrong numbers in it."""
    _check_checkpoint(_file("m.gguf", formats.gguf(Choices(data))))


def _archives() -> Iterable[bytes]:
    import io

    tensor = torch.randn(4, 4)
    for content in (
        {"a.weight": tensor, "b": tensor.t()},
        {"state_dict": {"a": nn.Parameter(tensor), "v": tensor[1:3]}, "epoch": 3},
        {
            "a": torch.eye(3).to_sparse(),
            "q": torch.zeros(0),
            "c": torch.zeros(2, dtype=torch.cfloat),
        },
    ):
        made = io.BytesIO()
        torch.save(content, made)
        yield made.getvalue()
    made = io.BytesIO()
    torch.save({"a": tensor}, made, _use_new_zipfile_serialization=False)
    yield made.getvalue()


@_target("torch", _archives, ("PK\x03\x04", "PK\x01\x02", "PK\x05\x06", "data.pkl", "data/0"))
def torch_file(data: bytes) -> None:
    """Any bytes as a file."""
    _check_checkpoint(_file("m.pt", data))


@_target(
    "torch-pickle",
    lambda: [formats.pickle_of(a) for a in _archives() if a[:2] == b"PK"],
    ("ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "ccollections\nOrderedDict\n",
     "cos\nsystem\n", "cbuiltins\neval\n", "ctorch._utils\n_rebuild_parameter\n", "R", "Q", "\x85",
     "ctorch._utils\n_rebuild_sparse_tensor\n", "ctorch\nSize\n", "ctorch\nload\n", "X\x03\0\0\0cpu"),
)  # fmt: skip
def torch_pickle(data: bytes) -> None:
    """Any bytes as the pickle of an archive that is right otherwise."""
    _check_checkpoint(_file("m.pt", formats.torch_archive(data)))


_QUANT_SUFFIXES = (
    "weight", "weight_scale", "comfy_quant", "scale_weight", "scale_input", "input_scale",
    "weight_scale_2", "bias", "weight_scale_inv", "zero_point", "absmax", "qweight", "scales",
)  # fmt: skip
_QUANT_FORMATS = (
    '{"format": "float8_e4m3fn"}', '{"format": "int8_tensorwise", "convrot": true}',
    '{"format": "nvfp4"}', '{"format": "mxfp8"}', '{"format": "svdquant_w4a4"}', "{}", "[]", "{",
    '{"format": "int4_tensorwise"}', '{"format": null}', '{"params": {"format": "nvfp4"}}',
    '{"format": "int8_tensorwise", "convrot": 1, "convrot_groupsize": 3}', '"nvfp4"', "1e999",
)  # fmt: skip
_SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 3, 5, 160)


@_target("quantised", lambda: [bytes([i, *range(i, 90)]) for i in range(0, 60, 4)])
def quantised(data: bytes) -> None:
    """Layers with scales and declarations of every dtype and shape, right and wrong."""
    choices = Choices(data)
    tensors, metadata = {}, {}
    for _ in range(1 + choices.number(6)):
        name = f"{choices.pick(('a', 'b', 'c.d'))}.{choices.pick(_QUANT_SUFFIXES)}"
        if name.endswith("comfy_quant"):
            text = choices.pick(_QUANT_FORMATS).encode()
            tensors[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            continue
        shape = [choices.pick(_SIZES) for _ in range(choices.number(4))]
        tensors[name] = torch.ones(shape).to(choices.pick(_DTYPES))
    if choices.number(3) == 1:
        layers = {"a": choices.pick(_QUANT_FORMATS)}
        metadata["_quantization_metadata"] = choices.pick(
            (json.dumps({"layers": layers}), '{"layers": 3}', "{", '{"layers": {"a": {}}}')
        )
    path = _file("m.safetensors", save(tensors, metadata))
    _check_checkpoint(path)
    module = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(64, 8, bias=False)})
    with suppress(DistorchError):
        distorch.load(module, path, "disk,*", min_bytes=0, strict=False, progress=False)
        for layer in module.values():
            layer.weight.float()  # its bytes arrive and are decoded


# --- LoRAs ---


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(16, 24)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        self.emb = nn.Embedding(10, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.to_q(self.emb(tokens)))
        return hidden + self.conv(hidden.reshape(1, 4, 2, -1)).sum()


@cache
def _patched_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    module, tokens = _Net().eval(), torch.arange(4)
    wanted = module(tokens)
    distorch.distribute(module, "cpu,50%;disk,*", min_bytes=0, progress=False)
    return module, tokens, wanted


def _check_lora(source: Path | dict[str, torch.Tensor]) -> None:
    """Put on and taken off, or refused: the model is as before, to the bit."""
    module, tokens, wanted = _patched_net()
    try:
        distorch.set_loras(module, [(source, 0.7)], strict_loras=False)
        module(tokens)
    except DistorchError:
        assert torch.equal(module(tokens), wanted), "a refused LoRA changed the model"
        return
    distorch.set_loras(module, [])
    assert torch.equal(module(tokens), wanted), "a LoRA that was taken off left something"


_STEMS = (
    "to_q", "transformer.to_q", "lora_unet_to_q", "base_model.model.to_q", "diffusion_model.conv",
    "lora_unet_conv", "conv", "norm", "emb", "base_model.model.emb", "nothing", "",
)  # fmt: skip
_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "dora_scale",
    "lora.down.weight", "lora.up.weight", "lora_mid.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
    "lokr_w2_b", "lokr_t2", "oft_blocks", "oft_R.weight", "rescale", "boft_R", "boft_s", "diff",
    "diff_b", "set_weight", "w_norm", "b_norm", "a1.weight", "a2.weight", "b1.weight", "b2.weight",
    "lora_A.default.weight", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
    "lora_B.bias", "reshape_weight", "unheard_of", "lora_A", "oft_diag", "lora_up.bias", "",
)  # fmt: skip
_LORA_SIZES = (2, 16, 24, 4, 8, 1, 3, 10, 0, 5, 64)
_VALUES = (0.01, 1.0, 0.0, float("nan"), float("inf"), -1e30)
_METADATA = (
    {}, {"alpha": "4"}, {"alpha": "nan"}, {"lora_adapter_metadata": '{"lora_alpha": 4, "r": 2}'},
    {"lora_adapter_metadata": '{"to_q.r": 2}'}, {"lora_adapter_metadata": "["}, {"ss_x": "{"},
    {"lora_adapter_metadata": '{"lora_alpha": 1e400, "r": 0}'}, {"r": "0", "lora_alpha": "true"},
    {"peft_type": "LOHA", "alpha": "3"}, {"lora_adapter_metadata": '{"peft_type": "OFT"}'},
)  # fmt: skip


@_target("lora", lambda: [bytes([i, *range(i, i + 60)]) for i in range(0, 120, 3)])
def lora(data: bytes) -> None:
    """Keys of every spelling, with factors of every shape and dtype."""
    choices = Choices(data)
    tensors = {}
    for _ in range(1 + choices.number(8)):
        stem, part = choices.pick(_STEMS), choices.pick(_PARTS)
        shape = [choices.pick(_LORA_SIZES) for _ in range(choices.pick((2, 1, 0, 3, 4)))]
        tensors[f"{stem}.{part}"] = torch.full(shape, choices.pick(_VALUES)).to(
            choices.pick(_DTYPES[:6])
        )
    metadata = choices.pick(_METADATA)
    name = choices.pick(("lora.safetensors", "adapter_model.safetensors"))
    _check_lora(_file(name, save(tensors, metadata)) if choices.number(4) else tensors)


_FITTING = {"to_q": (24, 16), "emb": (10, 16), "conv": (8, 36)}


@_target("lora-fitting", lambda: [bytes([i, i // 3, i * 7 % 256, 1, 2]) for i in range(60)])
def lora_fitting(data: bytes) -> None:
    """Factors that fit but for one thing."""
    choices = Choices(data)
    tensors = {}
    for _ in range(1 + choices.number(3)):
        stem = choices.pick(tuple(_FITTING))
        rows, columns = _FITTING[stem]
        rank = choices.pick((2, 1, 4, 3))
        made = choices.pick(_shapes_of_kinds(rows, columns, rank))
        for part, shape in made.items():
            if choices.number(12) == 11:
                continue  # one is lost
            wrong = choices.number(16) == 15
            tensors[f"{stem}.{part}"] = torch.full(
                [size + 1 for size in shape] if wrong else shape, 0.01
            ).to(choices.pick(_DTYPES[:3]))
    _check_lora(tensors)


def _shapes_of_kinds(rows: int, columns: int, rank: int) -> list[dict[str, tuple[int, ...]]]:
    return [
        {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank), "alpha": ()},
        {"lora_down.weight": (rank, columns), "lora_up.weight": (rows, rank), "dora_scale": (rows, 1)},
        {"hada_w1_a": (rows, rank), "hada_w1_b": (rank, columns), "hada_w2_a": (rows, rank),
         "hada_w2_b": (rank, columns), "alpha": ()},
        {"lokr_w1": (2, 2), "lokr_w2": (rows // 2, columns // 2)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (rows // 2, rank), "lokr_w2_b": (rank, columns // 2),
         "alpha": ()},
        {"oft_blocks": (2, rows // 2, rows // 2)}, {"diff": (rows, columns), "diff_b": (rows,)},
        {"a1.weight": (rank, columns), "a2.weight": (columns, rank), "b1.weight": (rank, columns),
         "b2.weight": (rows, rank), "alpha": ()},
        {"oft_R.weight": (2, columns // 2 * (columns // 2 - 1) // 2)},
        {"set_weight": (rows, columns)},
    ]  # fmt: skip


_ADAPTER_WORDS = (
    '"peft_type"', '"LORA"', '"LOHA"', '"LOKR"', '"OFT"', '"BOFT"', '"r"', '"lora_alpha"', '"alpha"',
    '"target_modules"', '"rank_pattern"', '"alpha_pattern"', '"use_rslora"', '"use_dora"', "true",
    '"fan_in_fan_out"', '"target_parameters"', '"trainable_token_indices"', '"to_q"', "0",
    '"layers_to_transform"', '"init_lora_weights"', '"modules_to_save"', "null", "1e999", "-1", "NaN",
    '"peft_version"', '"oft_block_size"', '"bias"', '"all"', '"layer_replication"', "[", "]",
)  # fmt: skip


@_target(
    "adapter-config",
    lambda: [
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], '
        b'"rank_pattern": {"to_q": 2}, "alpha_pattern": {"^to_.*": 3}, "use_rslora": true}',
        b'{"peft_type": "LORA", "r": 2, "target_parameters": ["to_q.weight"], "bias": "none"}',
    ],
    _ADAPTER_WORDS,
)
def adapter_config(data: bytes) -> None:
    """Any bytes as the configuration of an adapter whose tensors are right."""
    folder = _folder() / "adapter"
    folder.mkdir(exist_ok=True)
    tensors = {
        "base_model.model.to_q.lora_A.weight": torch.full((2, 16), 0.1),
        "base_model.model.to_q.lora_B.weight": torch.full((24, 2), 0.1),
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    (folder / "adapter_config.json").write_bytes(data)
    _check_lora(folder)


@_target("lora-keys", lambda: [b"to_q.lora_A.weight\nto_q.lora_B.weight\nto_q.alpha"], _PARTS)
def lora_keys(data: bytes) -> None:
    """Any text as keys."""
    keys = [k for k in data.decode(errors="replace").split("\n") if k][:8]
    if keys:
        path = _file("lora.safetensors", save({key: torch.ones(4, 16) for key in keys}))
        with suppress(DistorchError):
            read_lora(path)
        _check_lora(path)


# --- text ---


def _plan_seed() -> bytes:
    return json.dumps(distorch.plan(_Net(), "cpu,1kb;disk,*", min_bytes=0).to_dict()).encode()


@_target(
    "plan", lambda: [_plan_seed()], ('"placement"', '"sizes"', '"options"', "disk", "cpu+sim:0")
)
def plan(data: bytes) -> None:
    """Any bytes as a saved plan, whose hash is right where it can be."""
    path = _file("plan.json", data)
    try:
        content = json.loads(data)
        content["hash"] = distorch.Plan._from_content(content, "plan.json").hash
        path.write_text(json.dumps(content))
    except (DistorchError, ValueError, TypeError, RecursionError, KeyError, AttributeError):
        pass  # it is read as it is
    try:
        found = distorch.Plan.load(path)
    except FormatError as error:
        assert path.name in str(error), error
        return
    str(found), found.to_dict(), found.plot().svg(), found._repr_html_()
    module = _Net()
    before = module(torch.arange(4))
    with suppress(DistorchError):
        distorch.distribute(module, found, progress=False)
    assert torch.equal(module(torch.arange(4)), before)


def _trace_seed() -> bytes:
    module = nn.Linear(8, 8)
    distorch.distribute(module, "disk,*", min_bytes=0, progress=False)
    path = _folder() / "t.json"
    with distorch.trace(module, path):
        module(torch.ones(1, 8))
    return path.read_bytes()


@_target(
    "trace", lambda: [_trace_seed()], ('"ts"', '"dur"', '"ph"', '"X"', '"args"', "1e308", "NaN")
)
def trace(data: bytes) -> None:
    """Any bytes as a recorded trace."""
    path = _file("trace.json", data)
    try:
        found = Timeline.load(path)
    except FormatError as error:
        assert path.name in str(error), error
        return
    str(found), found.to_dict(), found.plot().svg(), found._repr_html_()


@_target(
    "calibration",
    lambda: [
        b'{"version": 1, "links": [{"donor": "cpu", "compute": "cuda:0", "rate": 1e9, "latency": '
        b'1e-5, "together": 5e8, "back": null}]}'
    ],
    ('"rate"', '"back"', "NaN", "1e400", "-1", "true", '""'),
)
def calibration(data: bytes) -> None:
    """Any bytes as the cache of what links carry."""
    links._known.clear()
    path = _file(links._cache_file().name, data)
    path.chmod(0o600)
    original = links._cache_file
    links._cache_file = lambda: path
    try:
        found = links.known_links()
    finally:
        links._cache_file = original
        links._known.clear()
        distorch._donors.link_rates.clear()
    if found is not None:
        str(found), found._repr_html_()
        assert all(link.rate > 0 and link.latency >= 0 for link in found.links)


@_target(
    "sums",
    lambda: [
        b'{"version": 1, "file": "", "stamp": [1, 300, 1], "cuts": [8, 100], "crc32": 0, "sums": '
        b'"AAAAAAAAAAAAAAAA"}'
    ],
    ('"cuts"', '"sums"', '"stamp"', "NaN", "1e400", "-1", "18446744073709551616", "true", "[]"),
)
def sums(data: bytes) -> None:
    """Any bytes as the checksums of a file, whose own checksum would let few through."""
    kept, file = _file("sums.json", data), _file("summed.bin", bytes(300))
    kept.chmod(0o600)
    originals = unchanged._file_of, unchanged._sum_of
    unchanged._file_of, unchanged._sum_of = lambda _: kept, lambda *_: 0
    try:
        found = unchanged.known_sums(file, (1, 300, 1))
        if found is not None:
            with suppress(FetchError):
                found.compare_all()
    finally:
        unchanged._file_of, unchanged._sum_of = originals


_MACHINE = {
    name: DeviceInfo(name, 1 << 34, 1 << 33) for name in ("cpu", "disk", "cuda:0", "cuda:1")
}


@_target(
    "spec",
    lambda: [b"cuda:0,2.5gb;cpu,*", b"cuda:0,25%;cpu,75%", b"auto", b"cuda:0,0.4;cpu+cuda:1,1gb;disk,*",
             b"4gb", b"cuda:0,5gb*;cpu,*"],
    ("cuda:0", "cpu", "disk", "gb", "kib", "%", "*", ";", ",", "+", "auto", ".", "0b", "\u0663", "vram"),
)  # fmt: skip
def spec(data: bytes) -> None:
    """Any text as a placement, a number of bytes, and what a node of ComfyUI takes."""
    text = data.decode(errors="surrogateescape")
    placement = _comfy_placement()
    for read in (
        parse_spec, parse_bytes, placement.expert_spec,
        lambda t: placement.old_placement("cuda:0", 4.0, t, "", _MACHINE),
        lambda t: placement.old_placement("cuda:0", 4.0, "cpu", t, _MACHINE),
        lambda t: distorch.plan(_Net(), t),
    ):  # fmt: skip
        with suppress(DistorchError):
            read(text)
    for old in True, False:
        placement.spec_problem(text, _MACHINE, old=old)
    with suppress(DistorchError):
        assert parse_spec(parse_spec(text).text) == parse_spec(text), "a spec's text is that spec"


@cache
def _comfy_placement():
    """The module that turns inputs of nodes into placements. Its package needs ComfyUI; it not."""
    import importlib.util
    import sys

    path = Path(distorch.__file__).parent / "comfy" / "placement.py"
    found = importlib.util.spec_from_file_location("distorch_comfy_placement", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module
