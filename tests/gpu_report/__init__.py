# SPDX-License-Identifier: Apache-2.0
"""Tests of `tests.gpu.report`, which need no GPU."""
