"""Layers that cast their weights to what comes in."""

import torch


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
