# SPDX-License-Identifier: Apache-2.0
"""Programs that try to break what README promises: kills, interrupts, loads of unusual size.

Each runs alone for as long as it is told (`python -m tests.reliability.kills --help`); the tests
here are their short forms.
"""
