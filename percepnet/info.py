"""`percepnet info`: the model, the delay and the CPU's path."""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import onnxruntime

from percepnet import native
from percepnet.constants import SAMPLE_RATE
from percepnet.model import Model
from percepnet.recordings import add_model_argument as add_arguments
from percepnet.stream import FrameAdapter

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Show the model, the delay and the CPU's path."""
    model = Model.load(arguments.model)
    manifest = model.manifest
    delays = [
        f"{1000 * FrameAdapter(rate, 1).latency_samples / rate:.1f} ms at {rate // 1000} kHz"
        for rate in (SAMPLE_RATE, 16_000, 8_000)
    ]
    rows = {
        "model": f"{manifest.name} {manifest.version}, {manifest.n_weights / 1e6:.1f} M weights",
        "licence": manifest.license,
        "sha256": manifest.sha256,
        "delay": ", ".join(delays),
        "precision": model.precision,
        "signal path": native.DESCRIPTION,
        "CPU": _cpu(),
        "onnxruntime": onnxruntime.__version__,
        "percepnet": version("percepnet"),
    }
    for name, value in rows.items():
        print(f"{name:12} {value}")
    return 0


def _cpu() -> str:
    """The CPU's name, and whether it has the instructions for fast 8-bit products."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}
    fast = sorted(flags & {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"})
    return f"{name}, {os.cpu_count()} cores, 8-bit products: {', '.join(fast) or 'no special instructions'}"
