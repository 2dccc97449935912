# SPDX-License-Identifier: Apache-2.0
"""Steps that are played without bytes: what a placement costs, and which one costs least."""

from distorch.rehearsal.optimal import Problem, arrangement, problem_of
from distorch.rehearsal.script import Script, check_step_fits, script_of

__all__ = ["Problem", "Script", "arrangement", "check_step_fits", "problem_of", "script_of"]
