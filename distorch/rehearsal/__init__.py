# SPDX-License-Identifier: Apache-2.0
"""Steps that are played without bytes: what a placement costs, and which one costs least."""

from distorch.rehearsal.optimal import arrangement, encoded_in
from distorch.rehearsal.problem import Problem, problem_of, rows_of
from distorch.rehearsal.script import Script, check_step_fits, script_of

__all__ = [
    "Problem",
    "Script",
    "arrangement",
    "check_step_fits",
    "encoded_in",
    "problem_of",
    "rows_of",
    "script_of",
]
