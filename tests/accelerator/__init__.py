# SPDX-License-Identifier: Apache-2.0
"""Tests that are the same on every accelerator: run by tests/sim and by tests/gpu.

Each takes a `machine` (machines.py), which both folders' conftest gives them.
"""
