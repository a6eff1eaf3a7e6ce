"""The process: what it refuses to start with, and how it starts and stops."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from conftest import export_random_model
from websockets.sync.client import connect

from service.serve import run

SERVE = """
import argparse
from service import serve
parser = argparse.ArgumentParser()
serve.add_arguments(parser)
raise SystemExit(serve.run(parser.parse_args()))
"""

ANYWHERE = ["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]

SANDBOX = """
import os
def refuse(*arguments):
    raise OSError(22, "Invalid argument")
os.sched_setscheduler = refuse
"""


def test_a_setting_that_cannot_be_meant_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argparse.Namespace(max_requests="many")) == 2
    assert capsys.readouterr().err == (
        "percepnet serve: --max-requests='many': expected a whole number from 1 up\n"
    )


def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    model = ["--model", str(tmp_path / "model.onnx")]
    command = [sys.executable, "-c", SERVE, "--workers", "1", *ANYWHERE, *model]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.startswith("percepnet serve: ")
    assert ended.stderr.count("\n") == 1


@contextmanager
def started(
    code: str, tmp_path: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """A process that serves, and the lines of its log so far; the others are added when the block ends."""
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    command = [sys.executable, "-c", code, "--workers", "1", "--model", str(model), *ANYWHERE]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for text in process.stderr:
            lines.append(json.loads(text))
            if "running on" in lines[-1]["message"]:
                break
        try:
            yield process, lines
        except BaseException:
            process.kill()
            raise
        lines += [json.loads(text) for text in process.stderr]


def address(lines: list[dict[str, Any]]) -> str:
    """Host and port that the log names last."""
    return next(word for word in lines[-1]["message"].split() if "://" in word).partition("://")[2]


def answers(lines: list[dict[str, Any]]) -> bool:
    """Whether it answers where its log says."""
    return httpx.get(f"http://{address(lines)}/readyz", timeout=100).status_code == 200


def test_the_service_starts_answers_and_stops_on_sigterm(tmp_path: Path) -> None:
    with started(SERVE, tmp_path, PERCEPNET_MODLE="x") as (process, lines):
        assert answers(lines)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
    assert lines[0] == {**lines[0], "level": "warning", "message": "no such setting: PERCEPNET_MODLE"}
    assert any("shutdown complete" in line["message"] for line in lines)


def test_garbage_from_callers_leaves_every_line_of_the_log_json(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    files = {"PERCEPNET_TLS_CERT": tmp_path / "cert.pem", "PERCEPNET_TLS_KEY": tmp_path / "key.pem"}
    certificate.cert_chain_pems[0].write_to_path(files["PERCEPNET_TLS_CERT"])
    certificate.private_key_pem.write_to_path(files["PERCEPNET_TLS_KEY"])
    paths = {name: str(path) for name, path in files.items()}
    with started(SERVE, tmp_path, **paths) as (process, lines):  # it reads them all as JSON
        told = next(line["message"] for line in lines if "gRPC" in line["message"])
        grpc_port = int(told.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", grpc_port), timeout=100) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            with suppress(ConnectionError):
                while caller.recv(4096):
                    pass
        process.send_signal(signal.SIGTERM)


def test_the_second_ctrl_c_ends_the_service_though_a_stream_is_open(tmp_path: Path) -> None:
    config = {"sample_rate_hz": 16_000, "encoding": "ENCODING_S16LE"}
    with (
        started(SERVE, tmp_path, PERCEPNET_SHUTDOWN_GRACE_SECONDS="1000") as (process, lines),
        connect(f"ws://{address(lines)}/v1/stream") as call,
    ):
        call.send(json.dumps({"config": config}))
        call.recv(timeout=100)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert next(text for text in process.stderr if "stopping" in text)
        process.send_signal(signal.SIGINT)
        process.wait(100)
    assert process.returncode == -signal.SIGINT
    assert {line["level"] for line in lines} <= {"info", "debug"}


def test_the_service_runs_where_classes_of_scheduling_cannot_be_set(tmp_path: Path) -> None:
    with started(SANDBOX + SERVE, tmp_path) as (process, lines):
        assert answers(lines)
        process.send_signal(signal.SIGTERM)
    told = [line for line in lines if line["level"] != "info"]
    assert [line["level"] for line in told] == ["warning"]
    assert told[0]["message"].endswith("Invalid argument")
