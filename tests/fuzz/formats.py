# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged in one place only: what a fuzzer changes, in a frame that is right."""

import io
import json
import struct
import zipfile

import torch

from tests.fuzz.choices import Choices

_STRUCTS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_SIZES = (1, 2, 32, 64, 256, 0, 3, 5, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
_MOST_BODY = 1 << 16


def safetensors(header: bytes) -> bytes:
    """A file with this header, and as many bytes behind it as it claims, if those are few."""
    try:
        entries = [e for e in json.loads(header).values() if "data_offsets" in e]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            RecursionError):  # fmt: skip
        end = 64
    body = bytes(i * 37 % 251 for i in range(min(max(end, 0), _MOST_BODY)))
    return struct.pack("<Q", len(header)) + header + body


def torch_archive(pickle: bytes) -> bytes:
    """What torch.save writes, with another pickle in it. It has three storages of 64 bytes."""
    storages = {str(i): torch.arange(16, dtype=torch.float32) for i in range(3)}
    good = io.BytesIO()
    torch.save(storages, good)
    made = io.BytesIO()
    with zipfile.ZipFile(good) as read, zipfile.ZipFile(made, "w") as archive:
        for entry in read.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            archive.writestr(entry.filename, pickle if is_pickle else read.read(entry))
    return made.getvalue()


def pickle_of(archive: bytes) -> bytes:
    """The pickle in a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(archive)) as read:
        name = next(n for n in read.namelist() if n.endswith("data.pkl"))
        return read.read(name)


def gguf(choices: Choices) -> bytes:
    """A GGUF file: few tensors and values, some of them with numbers that are too large."""
    tensors, values = choices.pick((1, 2, 3, 0, 255, 2**40)), choices.pick((0, 1, 2, 3, 2**50))
    made = io.BytesIO()
    made.write(b"GGUF" + struct.pack("<IQQ", choices.pick((3, 2, 1, 4, 0x03000000)), tensors,
                                     values))  # fmt: skip
    for i in range(min(values, 8)):
        made.write(_text(choices.pick((
            b"general.architecture", b"general.alignment", b"split.count", b"split.no",
            b"comfy.gguf.orig_shape.t0", b"k%d" % i, b"", b"\xff",
        ))))  # fmt: skip
        made.write(_value(choices, 0))
    for i in range(min(tensors, 8)):
        made.write(_text(choices.pick((b"t%d" % i, b"t0", b"", b"blk.0.attn_q.weight", b"\xff"))))
        dims = [choices.pick(_SIZES) for _ in range(choices.number(6))]
        made.write(struct.pack("<I", choices.pick((len(dims), 1, 9, 2**31))))
        made.write(b"".join(struct.pack("<Q", size) for size in dims))
        made.write(struct.pack("<I", choices.number(48)))
        made.write(struct.pack("<Q", choices.pick((0, 32, 64, 128, 256, 4096, 1, 2**63))))
    made.write(bytes(-made.tell() % 32))
    return made.getvalue() + (choices.rest() or bytes(range(256))) * 4


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(choices: Choices, depth: int) -> bytes:
    kind = choices.number(14)
    head = struct.pack("<I", kind) if depth == 0 else b""
    if kind in _STRUCTS:
        return head + choices.bytes(struct.calcsize(_STRUCTS[kind]))
    if kind == 8:
        return head + _text(choices.bytes(choices.number(8)))
    if kind != 9 or depth > 6:
        return head
    inner = choices.pick((4, 8, 9, 0, 7, 12, 200))
    count = choices.pick((1, 2, 0, 3, 2**20, 2**61))
    made = head + struct.pack("<IQ", inner, count)
    for _ in range(min(count, 3)):
        if inner in _STRUCTS:
            made += choices.bytes(struct.calcsize(_STRUCTS[inner]))
        elif inner == 8:
            made += _text(choices.bytes(choices.number(4)))
        elif inner == 9:
            made += _value(choices, depth + 1)
    return made
