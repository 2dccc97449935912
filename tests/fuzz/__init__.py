# SPDX-License-Identifier: Apache-2.0
"""Everything that reads a file or a string of a stranger, under a fuzzer.

`targets` says what is read and what may come of it. `python -m tests.fuzz` runs it under Atheris,
guided by coverage. `test_fuzz` replays the files that were found in the past, and a few thousand
mutations of good inputs, which takes no fuzzer.
"""
