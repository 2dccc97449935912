# SPDX-License-Identifier: Apache-2.0
"""Who may run how long, so that the report ends in time."""

from __future__ import annotations

import time
from collections.abc import Callable

PACKING_S = 15.0  # kept for stacks of the last item and for packing


class Schedule:
    """A deadline `seconds` from now, and what is left until it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self.seconds = seconds

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        """Seconds for items: packing's are kept back."""
        return max(0.0, self.seconds - self.spent() - self.packing)

    @property
    def packing(self) -> float:
        """A quarter of a report that is very short."""
        return min(PACKING_S, self.seconds / 4)

    def limit(self, budget: float, least: float) -> float | None:
        """What an item gets of its budget; None if that is less than it needs to be of use."""
        given = min(budget, self.left())
        return given if given >= least else None

    def grace(self) -> float:
        """What taking stacks may last after a timeout now."""
        return max(0.5, min(12.0, self.to_the_end()))

    def to_the_end(self) -> float:
        """Seconds until the last files are written: packing's, too."""
        return self.seconds - self.spent() - 3
