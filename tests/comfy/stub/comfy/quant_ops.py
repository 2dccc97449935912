# SPDX-License-Identifier: Apache-2.0
"""A weight that is several tensors in one, as comfy-kitchen's is: it copies its scales when it is
detached, cloned or moved, and is taken apart and put together by the protocol of torch.compile.
"""

import torch

aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """Numbers of 8 bits, a scale per row, and one for all."""

    @staticmethod
    def __new__(cls, numbers, rows, whole, dtype=torch.float32):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=dtype, device=numbers.device
        )

    def __init__(self, numbers, rows, whole, dtype=torch.float32):
        self._numbers, self._rows, self._whole = numbers, rows, whole

    @classmethod
    def from_float(cls, values, seed=0):
        whole = values.abs().max() / 127
        rows = values.abs().amax(1, keepdim=True) / 127 / whole
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(values.shape, generator=generator).to(values.device)
        scaled = values / (rows * whole)
        numbers = (scaled + noise).floor() if seed else scaled.round()
        return cls(numbers.clamp(-127, 127).to(torch.int8), rows, whole, values.dtype)

    def requantize_from_float(self, values, seed=0):
        return type(self).from_float(values, seed)

    def dequantize(self):
        return (self._numbers.float() * (self._rows * self._whole)).to(self.dtype)

    def data_ptr(self):
        return self._numbers.data_ptr()

    @property
    def nbytes(self):
        return self._numbers.nbytes

    def parts(self):
        return {"": self._numbers, "_rows": self._rows, "_whole": self._whole}

    def __tensor_flatten__(self):
        return ["_numbers", "_rows", "_whole"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts, dtype, size, stride):
        return QuantizedTensor(parts["_numbers"], parts["_rows"], parts["_whole"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, me = kwargs or {}, args[0]
        if func is aten.detach.default:
            return cls(me._numbers.detach(), me._rows.clone(), me._whole.clone(), me.dtype)
        if func in (aten.clone.default, aten._to_copy.default):
            dtype = kwargs.pop("dtype", me.dtype)
            return cls(*(func(part, **kwargs) for part in me.parts().values()), dtype)
        args = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*args, **kwargs)
