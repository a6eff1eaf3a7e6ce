"""PercepNet: full-band, real-time speech enhancement on CPUs."""

import os

# The official builds of onnxruntime report models and machines to their maker, unless told not to before they
# are imported. What runs here is nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
