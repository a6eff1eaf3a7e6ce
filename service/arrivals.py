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

    def looked(self, now: float, *, rests: bool = False) -> None:
        """The loop took what was there. rests: and takes what comes, to look up within LOOK_SECONDS again."""
        if now - self._away > LOOK_SECONDS:
            self._stalls.append((self._away, now))
        self._away = now + LOOK_SECONDS if rests else now

    def came(self, expected: float, now: float) -> float:
        """When a message came that is taken now: as expected, if the loop did not look then.

        What piled up during a stall comes one by one, and is looked for as long as the stall lasted.
        """
        for start, end in (*self._stalls, (self._away, now)):
            if start - LOOK_SECONDS <= expected < end and now - end <= end - start:
                return min(now, max(start, expected))
        return now
