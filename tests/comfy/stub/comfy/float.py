# SPDX-License-Identifier: Apache-2.0
"""Rounding."""


def stochastic_rounding(value, dtype, seed=0):
    return value.to(dtype)
