# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what gguf-py writes is read, what nobody should write is refused."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distorch
from distorch import FormatError, _ops
from distorch.cli.inspect import inspect_file
from distorch.formats.block_types import GGUF_TYPES
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.gguf import DTYPES, read_header

Q = gguf.GGMLQuantizationType


def raw(kind, shape, seed=0):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    bytes_shape = (*shape[:-1], shape[-1] // elements * size)
    return np.random.default_rng(seed).integers(0, 256, bytes_shape, dtype=np.uint8)


def write(path, tensors, values=(), arch="flux"):
    """`tensors`: (name, array, block type or None)."""
    writer = gguf.GGUFWriter(path, arch)
    for add, key, value in values:
        getattr(writer, f"add_{add}")(key, value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path):
    conv = raw(Q.Q8_0, (12, 32))
    tensors = [
        ("blocks.0.weight", raw(Q.Q4_K, (6, 512)), Q.Q4_K),
        ("conv.weight", conv, Q.Q8_0),
        ("bias", np.linspace(-1, 1, 5, dtype=np.float32), None),
        ("half", np.ones((3, 4), np.float16), None),
        ("video.weight", np.zeros((2, 3, 1, 2, 2), np.float32), None),
    ]
    values = [
        ("array", "comfy.gguf.orig_shape.conv.weight", [4, 3, 32]),
        ("array", "tokenizer.ggml.tokens", [f"token {i}" for i in range(1000)]),
        ("array", "numbers", list(range(500))),
        ("string", "general.name", "small"),
        ("bool", "yes", True),
        ("float64", "rate", 0.5),
    ]
    return write(tmp_path / "small.gguf", tensors, values)


def test_reads_what_gguf_writes(small):
    tensors, metadata = read_header(small)
    assert list(tensors) == ["blocks.0.weight", "conv.weight", "bias", "half", "video.weight"]
    assert metadata["general.architecture"] == "flux"
    assert metadata["tokenizer.ggml.tokens"] == "[1000 entries]"
    assert metadata["numbers"] == "[500 numbers]"
    assert (metadata["yes"], metadata["rate"]) == ("True", "0.5")
    data = small.read_bytes()
    for theirs in gguf.GGUFReader(small).tensors:
        ours = tensors[theirs.name]
        assert data[ours.offset : ours.offset + ours.nbytes] == theirs.data.tobytes()
        if ours.block_type:
            assert (ours.block_type, ours.dtype) == (theirs.tensor_type.name, torch.uint8)
    assert tensors["blocks.0.weight"].shape == (6, 512)
    assert tensors["conv.weight"].shape == (4, 3, 32)
    assert tensors["video.weight"].shape == (2, 3, 1, 2, 2)
    assert tensors["half"].dtype == torch.float16


def test_type_table_is_the_formats():
    for number, (name, elements, size) in GGUF_TYPES.items():
        assert Q(number).name == name
        assert gguf.GGML_QUANT_SIZES[Q(number)] == (elements, size)
        block = torch.zeros(1, size, dtype=torch.uint8)
        assert _ops.dequantise(block, name, torch.float32).shape == (1, elements)
    for number, dtype in DTYPES.items():
        assert gguf.GGML_QUANT_SIZES[Q(number)] == (1, dtype.itemsize)
    decodable = {Q.F32, Q.F16, *gguf.quants._type_traits}
    assert {int(kind) for kind in decodable} <= GGUF_TYPES.keys() | DTYPES.keys()


def test_plan_counts_quantised_bytes(small):
    plan = distorch.plan(str(small), "cpu,50%;disk,*", min_bytes=0)
    assert plan.total_bytes == 6 * 2 * 144 + 12 * 34 + 20 + 24 + 96
    assert set(plan.placement) == set(read_header(small)[0])


def test_inspect(small):
    contents = inspect_file(str(small))
    assert contents.kind == "GGUF checkpoint, architecture flux"
    assert contents.dtypes == {"Q4_K": 1728, "Q8_0": 408, "float32": 116, "float16": 24}
    assert "Q4_K" in str(contents)
    assert "75.9%" in str(contents)


# --- hostile files, made by hand ---


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor(name="a", dims=(32,), kind=8, offset=0):
    layout = f"<I{len(dims)}QIQ"
    return text(name) + struct.pack(layout, len(dims), *dims, kind, offset)


def made(tensors=(), values=(), *, version=3, count=None, value_count=None, data=b"\0" * 4096):
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<Q", len(tensors) if count is None else count)
    head += struct.pack("<Q", len(values) if value_count is None else value_count)
    head += b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def value(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def array(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


BIG = 1 << 63
HOSTILE = {
    "empty": (b"", "damaged"),
    "magic only": (b"GGUF", "no room"),
    "another format": (b"GGML" + b"\0" * 64, "not a GGUF file"),
    "no tensors": (made(), "no tensors"),
    "version 1": (made(version=1), "version 1"),
    "big-endian": (made(version=3 << 24), "big-endian"),
    "many tensors": (made(count=1 << 60), "tensors"),
    "more tensors than there is room for": (made(count=1 << 16), "no room"),
    "many values": (made(value_count=(1 << 64) - 1), "metadata values"),
    "key of 2^62 bytes": (made([tensor()], [struct.pack("<Q", 1 << 62)]), "string of"),
    "key not UTF-8": (made([tensor()], [value(b"\xff\xfe", 4, b"\0" * 4)]), "UTF-8"),
    "key twice": (made([tensor()], [value("k", 4, b"\0" * 4)] * 2), "twice"),
    "unknown value type": (made([tensor()], [value("k", 13, b"\0" * 8)]), "unknown type"),
    "array of 2^61 doubles": (made([tensor()], [value("k", 9, array(12, 1 << 61))]), "no room"),
    "array of 2^62 strings": (made([tensor()], [value("k", 9, array(8, 1 << 62))]), "no room"),
    "array of an unknown type": (made([tensor()], [value("k", 9, array(77, 2))]), "unknown type"),
    "arrays in arrays": (made([tensor()], [value("k", 9, array(9, 1) * 30)]), "deep"),
    "string without end": (made([tensor()], [value("k", 8, struct.pack("<Q", BIG))]), "string"),
    "tensor twice": (made([tensor(), tensor(offset=64)]), "twice"),
    "no dimensions": (made([tensor(dims=())]), "shape"),
    "nine dimensions": (made([tensor(dims=(32,) + (1,) * 8)]), "9 dimensions"),
    "2^31 dimensions": (made([text("a") + struct.pack("<I", 1 << 31)]), "dimensions"),
    "zero size": (made([tensor(dims=(32, 0))]), "shape"),
    "negative size": (made([tensor(dims=((1 << 64) - 32,))]), "shape"),
    "sizes that overflow": (made([tensor(dims=(1 << 32, 1 << 32, 1 << 32))]), "shape"),
    "part of a block": (made([tensor(dims=(33,))]), "shape"),
    "unknown type": (made([tensor(kind=99)]), "type 99"),
    "type without a decoder": (made([tensor(kind=15, dims=(256,))]), "type 15"),
    "offset beyond the file": (made([tensor(offset=1 << 20)]), "ends at byte"),
    "offset that overflows": (made([tensor(offset=(1 << 64) - 32)]), "ends at byte"),
    "misaligned": (made([tensor(offset=4)]), "aligned"),
    "one inside another": (made([tensor(dims=(1024,)), tensor("b", offset=64)]), "inside"),
    "alignment zero": (made([tensor()], [value("general.alignment", 4, b"\0" * 4)]), "alignment"),
    "alignment 3": (made([tensor()], [value("general.alignment", 4, b"\3\0\0\0")]), "alignment"),
    "alignment in words": (made([tensor()], [value("general.alignment", 8, text("x"))]), "align"),
    "another original shape": (
        made([tensor()], [value("comfy.gguf.orig_shape.a", 9, array(4, 1, b"\x21\0\0\0"))]),
        "said to have been",
    ),
    "negative original shape": (
        made([tensor()], [value("comfy.gguf.orig_shape.a", 9, array(5, 2, b"\xff" * 4 + b"\xe0" +
                                                                  b"\xff" * 3))]),
        "said to have been",
    ),
    "split": (made([tensor()], [value("split.count", 2, b"\3\0")]), "split"),
    "long name": (made([tensor(name="a" * 2000)]), "string of"),
    "data cut off": (made([tensor(dims=(4096,))], data=b"\0" * 4351), "ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


def test_the_hostile_files_differ_from_a_good_one_in_one_thing(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(made([tensor(), tensor("b", offset=64)]))
    assert list(open_checkpoint(path).tensors) == ["a", "b"]


def test_endless_header_takes_bounded_memory(tmp_path):
    """A sparse file of 64 GiB that claims to be one array of strings."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(made([tensor()], [value("k", 9, array(8, 1 << 32))], data=b""))
    with path.open("r+b") as file:
        file.truncate(64 << 30)
    tracemalloc.start()
    with pytest.raises(FormatError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def header_or_refusal(path, data):
    """Reading either works, and all ranges lie in the file, or is a FormatError."""
    path.write_bytes(data)
    try:
        tensors, _ = read_header(path)
    except FormatError:
        return
    for entry in tensors.values():
        assert 0 < entry.offset <= entry.offset + entry.nbytes <= len(data)


def test_every_truncation(small, tmp_path):
    data = small.read_bytes()
    end = max(t.offset for t in read_header(small)[0].values())
    path = tmp_path / "cut.gguf"
    for size in {*range(0, 200), *range(200, end, 97), end}:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_header(path)


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


def test_mutated_files(small, tmp_path):
    data = small.read_bytes()
    end = min(t.offset for t in read_header(small)[0].values())
    chosen = random.Random(6)
    path = tmp_path / "mutated.gguf"
    for _ in range(1500):
        mutant = bytearray(data)
        for _ in range(chosen.randint(1, 4)):
            at = chosen.randrange(end - 8)
            if chosen.random() < 0.5:
                mutant[at] = chosen.choice([chosen.randrange(256), *INTERESTING])
            else:
                number = chosen.choice([0, 1, 1 << 31, 1 << 32, BIG, (1 << 64) - 1])
                mutant[at : at + 8] = struct.pack("<Q", number)
        header_or_refusal(path, bytes(mutant))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic(tmp_path_factory, tail):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    header_or_refusal(path, b"GGUF\3\0\0\0" + tail)
