# SPDX-License-Identifier: Apache-2.0
"""The C++ compiler for tests that build something."""

import os

# Read when tests are collected: PEFT's BOFT layers set CXX to "gcc", which does not link C++.
COMPILER = os.environ.get("CXX", "c++")
