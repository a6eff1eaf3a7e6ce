"""When messages came: the event loop takes them later if it was busy, or if the whole process stood still."""

import math
from collections import deque

LOOK_SECONDS = 0.01
"""So often a loop at rest looks up: where a look is overdue, the process stood still."""


class Arrivals:
    """Tells when messages came, from when the event loop looked for them.

    Only time in which it did not look counts as waiting: who sends late has not waited.
    """

    def __init__(self) -> None:
        self._away = math.inf  # since when the loop does not look
        self._stalls: deque[tuple[float, float]] = deque(maxlen=8)
        self._over = -math.inf  # when all that piled up in them is taken

    def looked(self, now: float, until: float | None = None) -> None:
        """The loop took what was there. until: and takes what comes, until then at least."""
        if now - self._away > LOOK_SECONDS:
            self._stalls.append((self._away, now))
            self._over = max(self._over, 2 * now - self._away)
        self._away = now if until is None else until

    def came(self, expected: float, now: float) -> float:
        """When a message came that is taken now: as expected, if the loop did not look then.

        What piled up during a stall comes one by one, and is looked for as long as the stall lasted.
        """
        if self._away - LOOK_SECONDS <= expected < now:
            return min(now, max(self._away, expected))
        if now <= self._over:
            for start, end in self._stalls:
                if start - LOOK_SECONDS <= expected < end and now - end <= end - start:
                    return max(start, expected)
        return now
