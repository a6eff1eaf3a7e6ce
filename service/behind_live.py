"""Files on the engine of live streams: they get what the streams leave."""

import numpy as np

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer, EnhancerState
from percepnet.synthesis import Controls, FrameControls
from service.engine import Engine

PIECE_FRAMES = 4
"""Frames of a file enhanced between two looks at the live streams: about a millisecond."""

_LONGEST_WAIT_SECONDS = 0.1
"""A file gets one piece done in this time even when live streams leave no room, so that it ends some day."""


class BehindLive(Enhancer):
    """An enhancer for files that stands back while live streams have work.

    enhancer: does the work. engine: of the live streams. It is used in threads that do nothing but files.
    """

    def __init__(self, enhancer: Enhancer, engine: Engine) -> None:
        super().__init__(enhancer.model)
        self._enhancer = enhancer
        self._engine = engine

    def process(
        self, samples: np.ndarray, state: EnhancerState, controls: Controls | FrameControls = Controls()
    ) -> tuple[np.ndarray, EnhancerState]:
        """Enhance, piece by piece while there are live streams: the samples do not depend on it."""
        pieces = []
        done = 0
        while done < samples.shape[1]:
            self._engine.quiet.wait(_LONGEST_WAIT_SECONDS)
            size = PIECE_FRAMES * HOP if self._engine.active else samples.shape[1]
            piece, state = self._enhancer.process(samples[:, done : done + size], state, controls)
            self._engine.cpu.count_file()
            pieces.append(piece)
            done += size
        return np.concatenate(pieces, axis=1), state
