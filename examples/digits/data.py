# SPDX-License-Identifier: Apache-2.0
"""The digits that scikit-learn ships, as tensors, and a judge of sampled ones."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in -1..1 (ink is +1) and labels [1797]."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(data.target).long()


def share_recognised(samples: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of samples that a support vector machine trained on real digits calls right."""
    images, targets = digits()
    judge = SVC(gamma=0.001, C=10).fit((images.flatten(1) + 1) * 8, targets)
    return float(judge.score((samples.flatten(1) + 1) * 8, labels))
