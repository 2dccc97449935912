# SPDX-License-Identifier: Apache-2.0
"""Attributes by path, seeds, progress."""

import torch


def get_attr(model, key):
    for name in key.split("."):
        model = getattr(model, name)
    return model


def set_attr(model, key, value):
    path, _, name = key.rpartition(".")
    owner = get_attr(model, path) if path else model
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before


def load_torch_file(path, safe_load=False):
    return torch.load(path)


class ProgressBar:
    told = []

    def __init__(self, total):
        self.total = total

    def update(self, value):
        ProgressBar.told.append((value, self.total))
