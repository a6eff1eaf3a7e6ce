"""Sizes of the algorithm, in physical units. They are fixed; a model's manifest is checked against them."""

SAMPLE_RATE = 48_000
"""Rate of the signal path in Hz; other rates are resampled around it."""

HOP = 480
"""New samples per frame: 10 ms."""

WINDOW = 2 * HOP
"""Samples of one analysis and synthesis window: 20 ms."""

N_BINS = WINDOW // 2 + 1
"""Bins of a window's spectrum, 50 Hz apart."""

N_BANDS = 34
"""ERB-spaced bands from 0 to 20 kHz."""

LOOKAHEAD_FRAMES = 2
"""Frames that must have been heard beyond the window being synthesized: 20 ms."""

LATENCY_SAMPLES = (LOOKAHEAD_FRAMES + 1) * HOP
"""Algorithmic delay at 48 kHz: 10 ms of overlap and the look-ahead, 30 ms in all."""

MIN_PERIOD = 96
MAX_PERIOD = 768
"""Pitch periods in samples at 48 kHz: 500 Hz down to 62.5 Hz."""

COMB_ORDER = 5
"""The comb filter reaches this many pitch periods to each side."""

N_FEATURES = 2 * N_BANDS + 2
"""Band energies and band coherences, the pitch period, the pitch correlation."""
