# SPDX-License-Identifier: Apache-2.0
"""Layers that cast their weights to what comes in."""

import torch

from comfy.quant_ops import QuantizedTensor


class _Cast:
    comfy_cast_weights = True
    weight_function, bias_function = [], []

    def reset_parameters(self):
        return None


class manual_cast:  # noqa: N801
    class Linear(_Cast, torch.nn.Linear):
        def forward(self, x):
            weight, bias = (
                t.to(x.dtype) if t is not None else None for t in (self.weight, self.bias)
            )
            for change in self.weight_function:
                weight = change(weight)
            return torch.nn.functional.linear(x, weight, bias)

    class Conv1d(_Cast, torch.nn.Conv1d):
        pass

    class Conv2d(_Cast, torch.nn.Conv2d):
        pass

    class Conv3d(_Cast, torch.nn.Conv3d):
        pass

    class Embedding(_Cast, torch.nn.Embedding):
        pass


class mixed_precision(manual_cast):  # noqa: N801
    """Layers whose weights may be quantised: they patch them, and write their state dict."""

    class Linear(manual_cast.Linear):
        def forward(self, x):
            weight = self.weight
            if isinstance(weight, QuantizedTensor):
                weight = weight.to(x.dtype).dequantize()
            return torch.nn.functional.linear(x, weight, self.bias)

        def convert_weight(self, weight, inplace=False):
            return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False):
            weight = self.weight.requantize_from_float(weight, seed).to(self.weight.dtype)
            if not return_weight:
                self.weight = torch.nn.Parameter(weight, requires_grad=False)
            return weight

        def state_dict(self, *args, destination=None, prefix="", **_):
            found = {} if destination is None else destination
            found[f"{prefix}bias"] = self.bias
            weight = self.weight
            parts = weight.parts() if isinstance(weight, QuantizedTensor) else {"": weight}
            found.update({f"{prefix}weight{name}": part for name, part in parts.items()})
            return found
