# SPDX-License-Identifier: Apache-2.0
"""Streams on a GPU."""

from tests.accelerator.streams import *  # noqa: F403
