# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: what is in them and where, without reading the weights."""
