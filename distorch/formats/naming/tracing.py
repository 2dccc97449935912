# SPDX-License-Identifier: Apache-2.0
"""A conversion of weights, followed without reading one.

Note [Tracing a conversion]
The libraries that know a checkpoint's original names convert it with functions that rename, split,
swap and join whole weights. Such a function is run here on meta tensors: torch itself keeps their
shapes, strides and offsets right through every view, and a view's storage says which stored tensor
it is of. Joining and copying make a new storage; what it consists of is written down. Everything
else would compute with numbers that are not there, and is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distorch.errors import FormatError
from distorch.formats.block_types import SIZES, check_readable
from distorch.formats.quantisation import check_declared
from distorch.formats.stored import Piece, StoredTensor

Convert = Callable[[dict[str, torch.Tensor]], Mapping[str, Any]]

# A weight of more pieces was transposed: elements moved, not rows.
_MOST_PIECES = 1 << 17
_aten = torch.ops.aten


class NamesDoNotFitError(Exception):
    """A conversion did not find the names that it looks for."""


class ConversionError(FormatError):
    """A conversion computes with weights or moves single elements, so ranges of the file are not
    enough.
    """


class Run(NamedTuple):
    """Elements `begin` to `end` of a stored tensor, in its row-major order."""

    source: StoredTensor
    begin: int
    end: int


@dataclass(frozen=True)
class Traced:
    """A converted weight: as it can be read, and what it consists of."""

    stored: StoredTensor
    runs: tuple[Run, ...]


def trace(
    tensors: Mapping[str, StoredTensor], convert: Convert
) -> tuple[dict[str, Traced], list[str]]:
    """What `convert` makes of the tensors, by its names; and which it neither took nor used.

    Raises NamesDoNotFitError, and FormatError for what is more than moving rows.
    """
    tracer = _Tracer()
    checkpoint = {name: tracer.stand_in(stored) for name, stored in tensors.items()}
    with torch.no_grad(), tracer:
        try:
            converted = dict(convert(checkpoint))
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise NamesDoNotFitError(str(error)) from error
        except (ValueError, RuntimeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"the shapes of this checkpoint are not those that its conversion expects: {error}"
            ) from error
    found = {
        name: tracer.traced(name, value) for name, value in converted.items() if value is not None
    }
    used = {id(run.source) for traced in found.values() for run in traced.runs} | tracer.shifted
    left = [name for name in checkpoint if name in tensors and id(tensors[name]) not in used]
    return found, left


class _Made(NamedTuple):
    """What a storage holds: its runs in the order of its memory, and where each begins in it."""

    runs: Sequence[Run]
    starts: Sequence[int]
    tensor: torch.Tensor  # keeps the storage, and so its number, alive


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the runs behind every storage; refuses operators that make others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, _Made] = {}
        self.shifted: set[int] = set()  # ids of stored tensors that a number was added to

    def stand_in(self, stored: StoredTensor) -> torch.Tensor:
        """A meta tensor of its shape."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        self._note(tensor, [Run(stored, 0, tensor.numel())])
        return tensor

    def traced(self, name: str, value: Any) -> Traced:
        """The weight behind a result. FormatError when it is none that can be read."""
        made = self._find(value)
        if made is None:
            raise FormatError(
                f"{name!r}: its conversion made a {type(value).__name__}, where values of "
                "the file's tensors were expected; load the file with its own library"
            )
        runs = self.runs(value) or [made.runs[0]._replace(begin=0, end=0)]
        return Traced(as_stored(name, runs, tuple(value.shape)), tuple(runs))

    def runs(self, tensor: torch.Tensor) -> list[Run]:
        """The tensor's elements in row-major order, neighbours joined."""
        made = self._find(tensor)
        assert made is not None
        found: list[Run] = []
        for begin, length in _ranges(tensor, made.runs[0].source.name):
            for run in _cut(made, begin, begin + length):
                last = found[-1] if found else None
                if last and last.source is run.source and last.end == run.begin:
                    found[-1] = Run(run.source, last.begin, run.end)
                else:
                    found.append(run)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise self._refusal(func, args)
        out = func(*args, **kwargs)
        results = out if isinstance(out, list | tuple) else (out,)
        if all(self._find(result) is not None for result in results):
            return out  # views
        if func is _aten.clone.default:
            self._note(out, self.runs(args[0].permute(_memory_order(out))))
        elif func in (_aten.cat.default, _aten.stack.default) and self._are_known(args[0]):
            self._note(out, self._joined(out, *args, **kwargs))
        elif func in (_aten.sub.Tensor, _aten.add.Tensor) and self._can_shift(args):
            self._note(out, [self._shifted(func, *args)])
        else:
            raise self._refusal(func, args)
        return out

    def _are_known(self, parts: Sequence[torch.Tensor]) -> bool:
        return all(self._find(part) is not None for part in parts)

    def _joined(
        self, out: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0
    ) -> Iterator[Run]:
        """The runs of a joined tensor. The parts take turns: there is a round for each index of the
        dimensions before `dim`, and in each round every part gives its next elements.
        """
        rounds = prod(out.shape[: dim % max(out.dim(), 1)])
        known = [_made(self.runs(part), part) for part in parts if part.numel()]
        if rounds * len(known) > _MOST_PIECES:
            raise self._refusal(_aten.cat.default, parts)
        for number in range(rounds):
            for made in known:
                share = made.tensor.numel() // rounds
                yield from _cut(made, number * share, (number + 1) * share)

    def _can_shift(self, args: tuple[Any, ...]) -> bool:
        tensor, number = args
        made = self._find(tensor)
        if made is None or not isinstance(number, int | float):
            return False
        whole = len(made.runs) == 1 and tensor.numel() == made.runs[0].end
        return whole and tensor.dim() == 1 and tensor.dtype == torch.float32

    def _shifted(self, func: Any, tensor: torch.Tensor, number: float) -> Run:
        """A norm's weights (float32, one number per column) with a number added: read now."""
        (run,) = self.runs(tensor)
        data = func(run.source.read(), number)
        source = run.source
        stored = StoredTensor(
            source.name, source.path, 0, source.nbytes, source.dtype, source.shape, data
        )
        self.shifted.add(id(source))
        return Run(stored, 0, data.numel())

    def _find(self, value: Any) -> _Made | None:
        if not isinstance(value, torch.Tensor):
            return None
        made = self._made.get(value.untyped_storage()._cdata)
        return made if made is not None and value.dtype == made.tensor.dtype else None

    def _note(self, tensor: torch.Tensor, runs: Iterable[Run]) -> None:
        self._made[tensor.untyped_storage()._cdata] = _made(runs, tensor)

    def _refusal(self, func: Any, args: Sequence[Any]) -> ConversionError:
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,))]
        sources = [run.source.name for x in flat if (made := self._find(x)) for run in made.runs]
        return ConversionError(
            f"{sources[0] if sources else 'a weight'!r}: the conversion to the module's names "
            f"computes with it ({func}), and only whole ranges can be taken from a file as they "
            "are; convert the checkpoint with the module's own library and load the result"
        )


def _made(runs: Iterable[Run], tensor: torch.Tensor) -> _Made:
    found, starts = list(runs), [0]
    for run in found:
        starts.append(starts[-1] + run.end - run.begin)
    return _Made(found, starts, tensor)


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest."""
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim])


def _ranges(tensor: torch.Tensor, name: str) -> Iterator[tuple[int, int]]:
    """(begin, length) in elements of its storage, in row-major order of the tensor."""
    if tensor.numel() == 0:
        return
    dims = [
        (size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1
    ]
    length = 1
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if prod(size for size, _ in dims) > _MOST_PIECES:
        raise ConversionError(
            f"{name!r}: the conversion to the module's names transposes it, and only whole ranges "
            "can be taken from a file as they are; convert the checkpoint with the module's own "
            "library and load the result"
        )
    for index in product(*(range(size) for size, _ in dims)):
        steps = (i * step for i, (_, step) in zip(index, dims, strict=True))
        yield int(tensor.storage_offset()) + sum(steps), length


def _cut(made: _Made, begin: int, end: int) -> Iterator[Run]:
    """The runs of a storage's elements `begin` to `end`."""
    first = bisect_right(made.starts, begin) - 1
    for run, start in zip(made.runs[first:], made.starts[first:], strict=False):
        if start >= end:
            return
        low, high = max(begin, start), min(end, start + run.end - run.begin)
        yield Run(run.source, run.begin + low - start, run.begin + high - start)


def as_stored(name: str, runs: Sequence[Run], shape: tuple[int, ...]) -> StoredTensor:
    """A tensor of these elements: in its place in the file if it is one range of it.

    FormatError when they do not go together, or cut a quantised block.
    """
    sources = {id(run.source): run.source for run in runs}
    kinds = {(source.dtype, source.block_type) for source in sources.values()}
    if len(kinds) != 1:
        parts = ", ".join(f"{s.name!r} ({s.block_type or s.dtype})" for s in sources.values())
        raise FormatError(f"{name!r} is put together from {parts or 'nothing'}: expected one dtype")
    for source in sources.values():
        check_declared(source)
    declared = runs[0].source.declared
    if any(source.declared != declared for source in sources.values()):
        parts = ", ".join(repr(source.name) for source in sources.values())
        raise FormatError(
            f"{name!r} is put together from {parts}: expected one format (comfy_quant)"
        )
    pieces = tuple(_piece(run) for run in runs)
    whole = pieces[0].source
    if len(pieces) == 1 and whole.packing is not None and pieces[0].nbytes == whole.nbytes:
        return replace(whole, name=name, shape=shape)
    ((dtype, block_type),) = kinds
    nbytes, first = sum(piece.nbytes for piece in pieces), pieces[0]
    source, offset = first.source, first.source.offset + first.begin
    if len(pieces) > 1 or source.packing is not None or source.strides is not None:
        return StoredTensor(
            name, source.path, offset, nbytes, dtype, shape, block_type=block_type, pieces=pieces,
            declared=declared,
        )  # fmt: skip
    data = None
    if source.data is not None:
        data = source.data.detach().reshape(-1)[runs[0].begin : runs[0].end].view(shape)
    return StoredTensor(
        name, source.path, offset, nbytes, dtype, shape, data, block_type, declared=declared
    )


def _piece(run: Run) -> Piece:
    source = run.source
    elements, nbytes = 1, source.dtype.itemsize
    if source.block_type is not None:
        check_readable(source)
        elements, nbytes = SIZES[source.block_type]
    whole = max(elements, source.declared.rotation if source.declared is not None else 0)
    if run.begin % whole or run.end % whole:
        kind = "turned groups (convrot)" if whole > elements else "blocks"
        raise FormatError(
            f"{source.name!r} ({source.block_type or source.dtype}): the conversion to the "
            f"module's names cuts its {kind} of {whole} elements; load a version of the file that "
            "is not quantised"
        )
    begin, end = (edge // elements * nbytes for edge in (run.begin, run.end))
    return Piece(source, begin, end - begin)
