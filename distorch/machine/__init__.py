# SPDX-License-Identifier: Apache-2.0
"""This machine as numbers: its devices, what its links carry, and how fast it computes."""
