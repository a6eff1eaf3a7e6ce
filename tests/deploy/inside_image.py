"""What a container of the image must do, checked from its inside; `exercise_image.py` runs it there."""

import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile

from percepnet import native
from service.client import Client

AUDIO = "/check/noisy.wav"
START_SECONDS = 60
STOP_SECONDS = 30


def main(ports: str, health_check: str, entry_point: str, stop_signal: str) -> None:
    """Start the image's command, use it, stop it; raises AssertionError for what does not hold."""
    http_port, grpc_port = ast.literal_eval(ports)
    check_rights()
    assert [name for name in ("torch", "pip", "pytest") if find_spec(name)] == []
    assert native.AVAILABLE, "the signal path is compiled"

    server = subprocess.Popen(ast.literal_eval(entry_point), stderr=subprocess.PIPE, text=True)
    probe = ast.literal_eval(health_check)
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
        assert server.poll() is None, server.stderr.read()
        assert time.monotonic() < deadline, "never healthy"
        time.sleep(0.1)

    address = f"http://127.0.0.1:{http_port}"
    noisy, rate = soundfile.read(AUDIO, dtype="float32")
    request = urllib.request.Request(f"{address}/enhance", Path(AUDIO).read_bytes(), method="POST")
    request.add_header("Content-Type", "audio/wav")
    with urllib.request.urlopen(request, timeout=60) as response:
        clean, clean_rate = soundfile.read(io.BytesIO(response.read()), dtype="float32")
    assert (clean_rate, clean.shape) == (rate, noisy.shape)
    assert 0.05 < np.std(clean) / np.std(noisy) < 0.95, "noise is taken away, speech stays"

    with Client(f"127.0.0.1:{grpc_port}") as client, client.stream(rate, compensate_delay=True) as stream:
        live = [stream.push(noisy[start : start + 480]) for start in range(0, len(noisy), 480)]
        live.append(stream.end())
    # The file was written with 16 bits.
    assert np.max(np.abs(np.concatenate(live) - clean)) < 2**-14

    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as response:
        assert b"percepnet_streams_active 0.0" in response.read()

    server.send_signal(getattr(signal, stop_signal))
    _, logged = server.communicate(timeout=STOP_SECONDS)
    assert server.returncode in (0, -signal.SIGTERM), logged
    assert all(json.loads(line)["level"] == "info" for line in logged.splitlines()), logged
    print(f"as user {os.getuid()}: started, healthy, a file and a live stream enhanced alike, stopped")


def check_rights() -> None:
    """No root, no capability, nothing writable but /tmp."""
    status = Path("/proc/self/status").read_text()
    assert os.getuid() > 0
    assert int(re.search(r"CapEff:\s*(\w+)", status)[1], 16) == 0
    for folder in ("/", "/opt/percepnet", "/opt/percepnet/bin", "/usr/local", "/var/tmp", os.environ["HOME"]):
        try:
            Path(folder, "written").write_text("")
        except OSError:
            continue
        raise AssertionError(f"{folder} is writable")
    Path("/tmp/written").write_text("")


if __name__ == "__main__":
    main(*sys.argv[1:])
