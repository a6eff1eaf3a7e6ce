"""PercepNet: full-band, real-time speech enhancement on CPUs."""
