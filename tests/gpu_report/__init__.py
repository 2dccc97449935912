"""Tests of `tests.gpu.report`, which need no GPU."""
