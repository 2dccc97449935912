# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a checkpoint goes where in a module, and what may not be passed over."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Literal

import torch
from torch import nn

from distorch import _ops
from distorch.errors import FormatError, PlacementError, SpecError
from distorch.formats.block_types import SIZES, check_readable
from distorch.formats.checkpoint import Checkpoint, is_no_weight
from distorch.formats.plain_names import base_name, match_names, unwrapped
from distorch.formats.quantisation import check_declared, declared_name
from distorch.formats.scales import OF_THEIR_OWN, Scales, attach_scales, own_scales
from distorch.formats.stored import Declared, StoredTensor, same_bytes
from distorch.loading.job import Job
from distorch.lora import StoredRows
from distorch.patching import widened_in
from distorch.runtime import groups

_LOG = logging.getLogger("distorch")
_SHOWN = 4
FloatingDtype = torch.dtype | Literal["module"] | None


def tie_again(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Tied weights of a transformers model that lost their tie on the way to the meta device."""
    tie = getattr(module, "tie_weights", None)
    if not callable(tie):
        return
    parameters = dict(module.named_parameters())
    names = match_names(checkpoint.tensors, parameters)
    if any(parameters[name].is_meta for name in parameters.keys() - names.keys()):
        tie()


def match(
    module: nn.Module, checkpoint: Checkpoint, strict: bool, asked: FloatingDtype
) -> list[Job]:
    """Pairs stored tensors with parameters and buffers. FormatError on what does not fit.

    Floating ones become `asked`; None is what they are in the file, "module" what the module has.
    """
    by_parameter: dict[int, list[groups.Member]] = {}
    for member in groups.named_members(module):
        by_parameter.setdefault(id(member.parameter), []).append(member)
    buffers = groups.unique_buffers(module)
    wanted = [m.name for ms in by_parameter.values() for m in ms]
    wanted += [name for buffer in buffers for name in buffer.names]
    names = match_names(checkpoint.tensors, wanted)
    if wanted and not names and not strict:  # else it is told name by name
        raise FormatError(
            f"{checkpoint.path!r} has nothing of this {type(module).__name__}: it has names as "
            f"{list(checkpoint.tensors)[:_SHOWN]}, the module as {wanted[:_SHOWN]}"
        )
    used = set(names.values())
    left = {n for n in checkpoint.tensors if n not in used and not is_no_weight(n)}
    jobs, missing = [], []
    for members in by_parameter.values():
        stored = [checkpoint.tensors[names[m.name]] for m in members if m.name in names]
        if not stored:
            missing.append(members[0].name)
            continue
        check_readable(stored[0])
        own = members[0].parameter.dtype
        dtype = own if asked == "module" else asked
        job = _job(stored[0], members, dtype, checkpoint.is_gguf)
        _take_scales(job, stored[1:], checkpoint, left, dtype)
        jobs.append(job)
    for buffer in buffers:
        found = next((names[name] for name in buffer.names if name in names), None)
        if found is not None:
            tensor = checkpoint.tensors[found]
            check_readable(tensor)
            _check_plain(tensor, buffer.name)
            dtype = tensor.dtype
            if asked == "module" and dtype.is_floating_point:
                dtype = buffer.tensor.dtype
            jobs.append(Job(tensor, [], dtype, buffer))
        elif buffer.persistent:
            missing.append(buffer.name)
    whole = ((name, stored) for name, stored in names.items() if stored.endswith(name))
    prefix = next((stored.removesuffix(name) for name, stored in whole), "")
    unexpected = sorted(left)
    _check_companions(module, unexpected, missing, prefix)
    _report_keys(module, checkpoint, missing, unexpected, strict=strict, prefix=prefix)
    _check_shapes(jobs, checkpoint.is_gguf, widened_in(module))
    return sorted(jobs, key=lambda job: (job.stored.path, job.stored.offset))


def _job(
    stored: StoredTensor, members: list[groups.Member], dtype: torch.dtype | None, is_gguf: bool
) -> Job:
    own = members[0].parameter.dtype
    if stored.block_type is not None:
        return Job(stored, members, _decoded_to(dtype, own), rows=_rows(stored))
    if is_gguf and dtype is None and own.is_floating_point:
        dtype = own  # what small tensors were before they went into the file
    floating = stored.dtype.is_floating_point and dtype is not None
    return Job(stored, members, dtype if floating and dtype is not None else stored.dtype)


def _decoded_to(asked: torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """What fetches decode a weight to: as `load` was asked, or as near to the module's own dtype as
    they can. SpecError.
    """
    if asked is None:
        nearest = torch.float32 if own.itemsize > 4 else torch.bfloat16
        return own if own in _ops.DECODED_DTYPES else nearest
    if asked not in _ops.DECODED_DTYPES:
        raise SpecError(
            f"dtype={asked}: the file has weights in blocks or with scales, which are decoded to "
            "torch.float32, torch.float16 or torch.bfloat16; expected one of these"
        )
    return asked


def _take_scales(
    job: Job,
    others: list[StoredTensor],
    checkpoint: Checkpoint,
    left: set[str],
    dtype: torch.dtype | None,
) -> None:
    """Gives a job the scales that the file has for it and the module has no place for, and takes
    them from what is `left`. `others`: what the file has under the other names of a tied weight.
    """
    member, tensors = job.members[0], checkpoint.tensors
    kept = own_scales(member.owner, member.key) is not None
    scales, taken = attach_scales(job.stored, tensors, left, kept_by_module=kept)
    left -= set(taken)
    for other in others:
        also, taken = attach_scales(other, tensors, left, kept_by_module=kept)
        left -= set(taken)
        same = _same_scales(scales, also) and _coding(job.stored) == _coding(other)
        if not same or not same_bytes(job.stored, other):
            raise FormatError(
                f"{job.stored.name!r} and {other.name!r} are one weight in this module (tied), and "
                "differ in the file: untie them first, or load a file in which they are the same"
            )
    declared = job.stored.declared
    if kept and declared is not None and (declared.rotation or job.stored.block_type):
        raise FormatError(
            f"{member.name!r} is stored as {declared_name(declared)}, and the module keeps its "
            "scales itself. distorch decodes such weights for modules that keep none: nn.Linear"
        )
    if scales is not None:
        job.rows = replace(_rows(job.stored), scales=scales.grid, block=scales.block)
        job.dtype = _decoded_to(dtype, member.parameter.dtype)


def _coding(stored: StoredTensor) -> tuple[tuple[float, ...], int]:
    """The table and the rotation that a file declares for a tensor."""
    declared = stored.declared or Declared({})
    return declared.table, declared.rotation


def _rows(stored: StoredTensor) -> StoredRows:
    """How the numbers of a tensor are stored, without the scales that lie beside it."""
    table, rotation = _coding(stored)
    code = stored.block_type or _ops.code_of(stored.dtype)
    return StoredRows(code, table=_host_floats(table), rotation=rotation)


def _host_floats(table: tuple[float, ...]) -> torch.Tensor | None:
    """float32 on the host, whatever dtype and device the caller made the default."""
    return torch.tensor(table, dtype=torch.float32, device="cpu") if table else None


def _check_plain(stored: StoredTensor, name: str) -> None:
    """FormatError where the numbers of a buffer would have to be decoded."""
    declared = check_declared(stored)
    if stored.block_type is not None or (declared is not None and declared.rotation):
        kind = stored.block_type or _ops.code_of(stored.dtype)
        raise FormatError(
            f"the buffer {name!r} is stored as {declared_name(declared) if declared else kind}, "
            "which distorch decodes for parameters only"
        )


def _same_scales(one: Scales | None, other: Scales | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.block == other.block and torch.equal(one.grid, other.grid)


# What stands below a layer and says what its weight is.
_PARTS_OF_A_WEIGHT = (
    "weight.", "bias.", "parametrizations.", "base_layer.", "lora_", "_packed_params", "weight_",
    "input_quantizer", "output_quantizer",
)  # fmt: skip
# What tensors of quantisation are called, whatever they do.
_OF_NUMBERS = re.compile("scale|zero|quant|packed|absmax|codebook|g_idx|perm|smooth|[aw]max")


def _check_companions(
    module: nn.Module, unexpected: list[str], missing: list[str], prefix: str
) -> None:
    """FormatError on tensors beside a weight that are not known, strict or not.

    They may say what the weight's numbers mean: scales, permutations, a second part. Without them
    the weight would be wrong, and nobody would be told.
    """
    owners: dict[str, nn.Module] = {}
    for path, owner in module.named_modules(remove_duplicate=False) if unexpected else ():
        if owner._parameters or owner._buffers:
            owners[unwrapped(path)] = owner
    beside: dict[str, list[str]] = {}
    for key in unexpected:
        name = unwrapped(key)
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        path = name.rpartition(".")[0]
        while path and path not in owners:
            path = path.rpartition(".")[0]
        rest = name.removeprefix(f"{path}.") if path else name
        if path in owners and _is_companion(rest, owners[path]):
            beside.setdefault(path, []).append(key)
    for path, keys in beside.items():
        lost = [name for name in missing if name.rpartition(".")[0] == path]
        raise FormatError(
            f"the file has {', '.join(keys)} beside the weights of {path!r}"
            + (f", whose {', '.join(lost)} it lacks" if lost else "")
            + ". This version does not know what they do to the weights: load a file without them"
        )


def _is_companion(rest: str, owner: nn.Module) -> bool:
    """Whether what stands below a module in a file, and not in the module, may change its weight.

    A layer has nothing but its weights; a block may have parameters that this one does without.
    """
    if rest in OF_THEIR_OWN:
        return False
    if rest.startswith(_PARTS_OF_A_WEIGHT):
        return True
    is_layer = not owner._modules
    return "." not in rest and (is_layer or _OF_NUMBERS.search(rest) is not None)


def _report_keys(
    module: nn.Module,
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
    *,
    strict: bool,
    prefix: str,
) -> None:
    meta = [name for name, p in module.named_parameters() if p.is_meta and name in set(missing)]
    if (missing or unexpected) and (strict or meta):
        raise FormatError(
            f"{checkpoint.path!r} does not fit this {type(module).__name__}: "
            f"{len(missing)} missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}). "
            "Build the module with the checkpoint's own configuration"
            + ("" if meta else ", or pass strict=False")
        )
    _tell(module, checkpoint, missing, [name for name in unexpected if name.startswith(prefix)])


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)]) or "-"


def _tell(
    module: nn.Module, checkpoint: Checkpoint, missing: list[str], unexpected: list[str]
) -> None:
    """Logs what `strict=False` passes over, but for what the module's class says is usual."""
    for names, what, usual in (
        (missing, "are not in it, and stay as they are", "_keys_to_ignore_on_load_missing"),
        (unexpected, "are in it, and are not used", "_keys_to_ignore_on_load_unexpected"),
    ):
        patterns = [str(pattern) for pattern in getattr(module, usual, None) or ()]
        told = [name for name in names if not any(re.search(p, name) for p in patterns)]
        if told:
            shown = ", ".join(map(repr, told[:_SHOWN]))
            _LOG.warning(
                "%s: %d of the names of %s %s: %s%s", checkpoint.path, len(told),
                type(module).__name__, what, shown, ", ..." if len(told) > _SHOWN else "",
            )  # fmt: skip


def _check_shapes(jobs: list[Job], is_gguf: bool, widened: Mapping[str, int]) -> None:
    """Each tensor has its place's shape. GGUF files drop dimensions of 1, and get them back. Layers
    that LoRAs have `widened` get their own columns again.
    """
    for job in jobs:
        if job.buffer is not None:
            shape = tuple(job.buffer.tensor.shape)
        else:
            shape = tuple(job.members[0].parameter.shape)
        if (own := widened.get(base_name(job.name))) is not None:
            shape = shape[0], own
        if is_gguf and _without_ones(shape) == _without_ones(job.stored.shape):
            job.stored = replace(job.stored, shape=shape)
        job.stored = _without_padding(job.stored, shape)
        if shape != job.stored.shape:
            raise FormatError(
                f"{job.stored.name!r}: the file has shape {job.stored.shape}, the module wants "
                f"{shape}; {_advice(job.stored)}"
            )


def _advice(stored: StoredTensor) -> str:
    own = "build the module with the checkpoint's own configuration"
    if stored.packing is None or stored.packing.row_multiple == 1:
        return own
    return f"{own}. (Rows that were padded with zeros are cut off; padded columns are not read)"


def _without_padding(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """A packed weight without the rows of zeros that its format adds for cuBLAS."""
    packing = stored.packing
    if packing is None or stored.block_type is None or stored.shape[1:] != shape[1:]:
        return stored
    rows, multiple = stored.shape[0], packing.row_multiple
    padded = shape[0] < rows == -(-shape[0] // multiple) * multiple
    if not padded or not packing.is_padding(shape[0], rows):
        return stored
    elements, nbytes = SIZES[stored.block_type]
    return replace(stored, shape=shape, nbytes=prod(shape) // elements * nbytes)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def check_no_meta_left(module: nn.Module, jobs: list[Job]) -> None:
    """PlacementError that names the buffers without values that the file does not bring."""
    filled = {id(job.buffer.tensor) for job in jobs if job.buffer is not None}
    empty = [
        buffer.name
        for buffer in groups.unique_buffers(module)
        if buffer.tensor.is_meta and id(buffer.tensor) not in filled
    ]
    if empty:
        raise PlacementError(
            f"{len(empty)} buffers ({', '.join(map(repr, empty[:_SHOWN]))}) are on the meta "
            "device, and the checkpoint does not have them. Make the module inside `with "
            "distorch.init_empty_weights():`, which leaves buffers as the module's own __init__ "
            "fills them, or set them first"
        )
