"""Streams on a GPU."""

from tests.accelerator.streams import *  # noqa: F403
