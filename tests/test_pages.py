"""Large pages."""

import numpy as np

from service import pages


def test_collapsing_leaves_every_byte_as_it_was():
    blocks = [np.random.default_rng(seed).bytes(5_000_000) for seed in range(3)]
    copies = [bytearray(block) for block in blocks]
    pages.collapse()
    assert copies == blocks
