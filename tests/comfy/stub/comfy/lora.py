# SPDX-License-Identifier: Apache-2.0
"""Patches: strength times up @ down, or a difference."""

import torch


class Adapter:
    """`weights`: (up, down)."""

    def __init__(self, *weights):
        self.weights = weights


def calculate_weight(patches, weight, key, intermediate_dtype=torch.float32):
    for strength, adapter, *_ in patches:
        up, down = (
            part.to(device=weight.device, dtype=intermediate_dtype) for part in adapter.weights
        )
        weight += strength * (up @ down)
    return weight
