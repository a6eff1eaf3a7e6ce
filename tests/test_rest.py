"""The HTTP interface, through a real server on a real socket, with real files.

Invariant: every request ends in the enhanced file or in one declared problem; never a 500, never a hang, and
nothing stays behind.
"""

import io
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import running
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TIMEOUT_SECONDS, eventually

from percepnet.enhancer import Enhancer, EnhancerState
from percepnet.model import Model
from percepnet.stream import enhance_file
from percepnet.synthesis import Controls
from service.errors import ANSWERS
from service.logs import JsonFormatter
from service.settings import Origins

RATE = 16_000


class Service(running.Service):
    """A running server and what callers send to it."""

    def enhance(self, content: Any, **parameters: Any) -> httpx.Response:
        """Post a bare body."""
        headers = {"Content-Type": "application/octet-stream"}
        return self.http.post("/enhance", content=content, params=parameters, headers=headers)

    def send(self, request: bytes) -> socket.socket:
        """Open a connection and send raw bytes."""
        connection = socket.create_connection(self.address, timeout=TIMEOUT_SECONDS)
        connection.sendall(request)
        return connection


def post_head(length: int) -> bytes:
    """The head of a request with a bare body, as bytes for a socket."""
    lines = "POST /enhance HTTP/1.1", "Host: x", "Content-Type: audio/flac", f"Content-Length: {length}"
    return "\r\n".join((*lines, "", "")).encode()


serving = partial(running.serving, Service)


@pytest.fixture(scope="module")
def service(enhancer: Enhancer) -> Iterator[Service]:
    """A service with small limits: 10 s, 2 channels, 2 MiB in and 1 MiB out."""
    choices = {"max_upload_mib": 2, "max_result_mib": 1, "max_duration_seconds": 10, "max_channels": 2}
    with serving(enhancer, **choices) as service:
        yield service


class Paced(Enhancer):
    """Lets the audio pass, one block for each permit."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.permits = threading.Semaphore(0)
        self.blocks = 0

    def process(
        self, samples: np.ndarray, state: EnhancerState, controls: Controls
    ) -> tuple[np.ndarray, EnhancerState]:
        """Wait, then return the samples as they are."""
        self.blocks += 1
        assert self.permits.acquire(timeout=TIMEOUT_SECONDS)
        return samples, state


@pytest.fixture
def paced(random_model: Model) -> Iterator[Paced]:
    enhancer = Paced(random_model)
    yield enhancer
    enhancer.permits.release(10_000)


def recording(seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Noise under a tone, (n, channels) float64."""
    n = round(seconds * rate)
    rng = np.random.default_rng(1)
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(n) / rate)
    return tone[:, np.newaxis] + 0.05 * rng.standard_normal((n, channels))


def encoded(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=format)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(content))[0]


def enhanced_by_library(enhancer: Enhancer, content: bytes, format: str, **controls: Any) -> bytes:
    target = io.BytesIO()
    enhance_file(io.BytesIO(content), target, controls=Controls(**controls), enhancer=enhancer, format=format)
    return target.getvalue()


def wav(
    rate: int = RATE, channels: int = 1, format: int = 1, bits: int = 16, data: bytes = bytes(3200)
) -> bytes:
    """A WAV file with any header whatever."""
    align = channels * bits // 8
    fields = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, format, channels, rate, rate * align & 0xFFFF_FFFF, align & 0xFFFF, bits
    )
    body = b"WAVE" + fields + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def assert_problem(response: httpx.Response, status: int, code: str, words: str = "") -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["title"]
    assert words in problem["detail"]


# What comes out


@pytest.mark.parametrize("rate", [8000, 22_050, 48_000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_a_wav_comes_back_enhanced_in_its_own_encoding(
    service: Service, enhancer: Enhancer, rate: int, subtype: str
) -> None:
    content = encoded(recording(0.3, rate, channels=2), rate, subtype=subtype)
    response = service.enhance(content)
    assert response.status_code == 200
    assert np.array_equal(decoded(response.content), decoded(enhanced_by_library(enhancer, content, "wav")))
    sound = soundfile.SoundFile(io.BytesIO(response.content))
    assert (sound.samplerate, sound.channels, sound.subtype) == (rate, 2, subtype)
    assert sound.frames == round(0.3 * rate)


@pytest.mark.parametrize(
    ("format", "subtype"), [("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_every_accepted_format_is_read(service: Service, format: str, subtype: str | None) -> None:
    content = encoded(recording(), format=format, subtype=subtype)
    response = service.enhance(content)
    assert response.status_code == 200
    assert response.headers["content-type"] == "audio/wav"
    with (
        soundfile.SoundFile(io.BytesIO(content)) as before,
        soundfile.SoundFile(io.BytesIO(response.content)) as after,
    ):
        assert (after.frames, after.samplerate, after.channels) == (before.frames, RATE, 1)


@pytest.mark.parametrize(
    ("format", "media_type", "container", "subtype"),
    [
        ("wav", "audio/wav", "WAV", "PCM_16"),
        ("flac", "audio/flac", "FLAC", "PCM_16"),
        ("ogg", "audio/ogg", "OGG", "VORBIS"),
        ("opus", "audio/ogg", "OGG", "OPUS"),
    ],
)
def test_the_asked_format_is_written(
    service: Service, format: str, media_type: str, container: str, subtype: str
) -> None:
    response = service.enhance(encoded(recording()), format=format)
    assert response.headers["content-type"] == media_type
    assert f"-enhanced.{format}" in response.headers["content-disposition"]
    with soundfile.SoundFile(io.BytesIO(response.content)) as sound:
        assert (sound.format, sound.subtype, sound.frames) == (container, subtype, RATE // 2)


def test_a_form_and_a_bare_body_give_the_same(service: Service) -> None:
    content = encoded(recording())
    form = service.http.post("/enhance", files={"file": ("a.wav", content)})
    assert form.status_code == 200
    assert form.content == service.enhance(content).content


@pytest.mark.parametrize("content_type", ["audio/x-wav", "AUDIO/WAV; rate=16000", "application/ogg", None])
def test_a_bare_body_may_be_called_any_kind_of_audio(service: Service, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert service.http.post("/enhance", content=encoded(recording()), headers=headers).status_code == 200


def test_parameters_in_the_query_and_in_the_form_do_the_same(service: Service, enhancer: Enhancer) -> None:
    content = encoded(recording())
    parameters = {"attenuation_limit_db": 6.0, "mix": 0.75, "postfilter": 0.25}
    expected = enhanced_by_library(enhancer, content, "wav", **parameters)
    assert expected != enhanced_by_library(enhancer, content, "wav")
    texts = {name: str(value) for name, value in parameters.items()}
    assert service.enhance(content, **texts).content == expected
    assert service.http.post("/enhance", files={"file": content}, data=texts).content == expected
    both = service.http.post(
        "/enhance?mix=0.75", files={"file": content}, data=dict(list(texts.items())[::2])
    )
    assert both.content == expected


def test_the_headers_tell_model_and_speed(service: Service, random_model: Model) -> None:
    headers = service.enhance(encoded(recording(2.0))).headers
    assert headers["percepnet-model"] == random_model.manifest.name
    assert headers["percepnet-model-version"] == random_model.manifest.version
    assert float(headers["percepnet-audio-seconds"]) == 2.0
    seconds, factor = (
        float(headers["percepnet-processing-seconds"]),
        float(headers["percepnet-real-time-factor"]),
    )
    assert seconds > 0
    assert factor == pytest.approx(seconds / 2.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "plain", "full"),
    [
        ("call.mp3", "call-enhanced.wav", "call-enhanced.wav"),
        ("C:\\calls\\Größe 1.flac", "Gr__e 1-enhanced.wav", "Gr%C3%B6%C3%9Fe%201-enhanced.wav"),
        ("../../etc/passwd", "passwd-enhanced.wav", "passwd-enhanced.wav"),
        ('a"; x=\r\nb.wav', None, None),
    ],
)
def test_the_answer_is_named_after_the_upload(
    service: Service, name: str, plain: str | None, full: str | None
) -> None:
    response = service.http.post("/enhance", files={"file": (name, encoded(recording(0.1)))})
    assert response.status_code == 200
    disposition = response.headers["content-disposition"]
    assert disposition.count('"') == 2
    if plain:
        assert disposition == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{full}"


# What is refused

NAN = np.array([0.0, np.nan, 0.0], "<f4").tobytes()

BAD_FILES = {
    "empty": (b"", 400, "bad_body", "empty"),
    "text": (b"not audio at all, " * 100, 415, "not_audio", "accepted"),
    "aiff": (encoded(recording(), format="AIFF"), 415, "not_audio", "accepted"),
    "header_only": (wav(data=b""), 400, "unusable_audio", ""),
    "half_a_header": (wav()[:30], 400, "unusable_audio", "truncated"),
    "truncated_wav": (encoded(recording())[:-1000], 400, "unusable_audio", "truncated"),
    "truncated_flac": (encoded(recording(), format="FLAC")[:-2000], 400, "unusable_audio", ""),
    "truncated_ogg": (encoded(recording(), format="OGG")[:-500], 400, "unusable_audio", "truncated"),
    "nan": (wav(format=3, bits=32, data=NAN), 400, "unusable_audio", "finite"),
    "no_channels": (wav(channels=0), 400, "unusable_audio", ""),
    "rate_0": (wav(rate=0), 400, "unusable_audio", ""),
    "rate_100": (wav(rate=100), 400, "unusable_audio", "100 Hz"),
    "rate_absurd": (wav(rate=0x7FFF_FFFF), 400, "unusable_audio", ""),
    "too_many_channels": (encoded(recording(channels=3)), 413, "too_large", "3 channels"),
    "too_long": (encoded(np.zeros(11 * RATE), format="FLAC"), 413, "too_large", "10 s"),
    "result_too_large": (
        encoded(np.zeros((9 * 96_000, 1)), 96_000, "FLAC"), 413, "too_large", "enhanced file is larger"
    ),
    "upload_too_large": (bytes(3 << 20), 413, "too_large", "2 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("as_form", [False, True], ids=["body", "form"])
def test_each_bad_file_has_its_declared_problem(service: Service, name: str, as_form: bool) -> None:
    content, status, code, words = BAD_FILES[name]
    if as_form:
        response = service.http.post("/enhance", files={"file": ("x", content)})
    else:
        response = service.enhance(content)
    assert_problem(response, status, code, words)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("mix=1.01", "mix='1.01'"),
        ("mix=-0.1", "mix"),
        ("mix=nan", "mix"),
        ("mix=", "mix"),
        ("attenuation_limit_db=-1", "attenuation_limit_db"),
        ("attenuation_limit_db=inf", "attenuation_limit_db"),
        ("attenuation_limit_db=much", "attenuation_limit_db"),
        ("attenuation_limit_db=101", "attenuation_limit_db='101': Input should be less than or equal to 100"),
        ("postfilter=maybe", "postfilter"),
        ("postfilter=1.5", "postfilter='1.5': Input should be less than or equal to 1"),
        ("format=mp3", "format"),
        ("format=WAV%00", "format"),
        ("postfiter=false", "postfiter: no such parameter"),
        ("mix=0.5&mix=0.6", "more than once: mix"),
    ],
)
def test_a_bad_parameter_is_named(service: Service, query: str, words: str) -> None:
    content = encoded(recording(0.1))
    response = service.http.post(f"/enhance?{query}", content=content)
    assert_problem(response, 422, "bad_parameter", words)
    assert "None" not in response.json()["detail"]
    given = httpx.QueryParams(query)
    fields = {name: given.get_list(name) for name in given}
    response = service.http.post("/enhance", files={"file": content}, data=fields)
    assert_problem(response, 422, "bad_parameter", words)


def test_a_parameter_given_in_query_and_form_is_refused(service: Service) -> None:
    response = service.http.post("/enhance?mix=1", files={"file": b"x"}, data={"mix": "1"})
    assert_problem(response, 422, "bad_parameter", "more than once: mix")


def test_a_format_that_cannot_hold_the_audio_is_a_bad_parameter(service: Service) -> None:
    content = encoded(recording(0.1, 44_100), 44_100)
    assert_problem(service.enhance(content, format="opus"), 422, "bad_parameter", "44100 Hz")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/html"},
        {"Content-Type": "video/mp4"},
        {"Content-Type": "audio/wav", "Content-Encoding": "gzip"},
    ],
)
def test_a_body_of_another_kind_is_refused(service: Service, headers: dict[str, str]) -> None:
    response = service.http.post("/enhance", content=encoded(recording(0.1)), headers=headers)
    assert_problem(response, 415, "unsupported_media_type")


def test_a_bare_body_may_come_as_curl_calls_any_body(service: Service) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    content = encoded(recording(0.1))
    assert service.http.post("/enhance", content=content, headers=headers).status_code == 200
    response = service.http.post("/enhance", data={"file": "noisy.wav"})
    assert response.request.headers["content-type"] == headers["Content-Type"]
    assert_problem(response, 415, "not_audio", "accepted")


def multipart(*parts: str) -> dict[str, Any]:
    return {"content": "\r\n".join(parts), "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


FILE_PART = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'


@pytest.mark.parametrize(
    "request_",
    [
        multipart(),
        multipart("--b--", ""),
        multipart("--b", FILE_PART, "RIFF"),
        multipart("--b", FILE_PART, "RIFF", "--b"),
        multipart("--b", FILE_PART.replace('"file"', '"sound"'), "RIFF", "--b--", ""),
        multipart("--b", 'Content-Disposition: form-data; name="file"\r\n', "RIFF", "--b--", ""),
        multipart("--b", "No-Disposition: 1\r\n", "RIFF", "--b--", ""),
        multipart("--b", FILE_PART, "1", "--b", FILE_PART, "2", "--b--", ""),
        multipart("--b", FILE_PART, "", "--b--", ""),
        multipart("--c", FILE_PART, "RIFF", "--c--", ""),
        {"content": "x", "headers": {"Content-Type": "multipart/form-data"}},
        {"data": {"mix": "2" * 2000}, "files": {"file": b"x"}},
        {"data": {f"f{i}": "1" for i in range(20)}, "files": {"file": b"x"}},
    ],
)
def test_a_form_without_exactly_one_whole_file_is_refused(service: Service, request_: dict[str, Any]) -> None:
    assert_problem(service.http.post("/enhance", **request_), 400, "bad_body")


@pytest.mark.parametrize(("charset", "name"), [("undefined", "mix"), ("utf-7", "+2AA-")])
def test_a_form_that_is_no_text_in_its_charset_is_refused(service: Service, charset: str, name: str) -> None:
    field = f'Content-Disposition: form-data; name="{name}"\r\n'
    form = multipart("--b", FILE_PART, "RIFF", "--b", field, "1", "--b--", "")
    form["headers"]["Content-Type"] += f"; charset={charset}"
    told = f"charset={charset}: the form is no text in this charset"
    assert_problem(service.http.post("/enhance", **form), 400, "bad_body", told)


def test_an_upload_is_cut_off_at_the_limit_when_no_length_is_declared(service: Service) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while taken < 1 << 30:
            taken += 1 << 16
            yield bytes(1 << 16)

    assert_problem(service.enhance(endless()), 413, "too_large", "2 MiB")
    assert taken < 1 << 29


def test_a_declared_length_beyond_the_limit_is_refused_before_the_transfer(service: Service) -> None:
    with service.send(post_head(1 << 30)) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_an_upload_that_stalls_is_given_up(random_model: Model) -> None:
    with serving(Enhancer(random_model), transfer_timeout_seconds=0.1) as service:
        with service.send(post_head(1000) + b"RIFF") as connection:
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"upload_timeout"' in answer
        service.wait_for("percepnet_files_accepted", 0)


def test_an_unknown_path_or_method_is_a_problem_too(service: Service) -> None:
    assert_problem(service.http.get("/enhanced"), 404, "not_found")
    assert_problem(service.http.post("/enhance/", content=b"x"), 404, "not_found")
    response = service.http.get("/enhance")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_fault_of_the_service_tells_nothing_of_its_inside(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    enhancer = Enhancer(random_model)
    with serving(enhancer) as service:
        with monkeypatch.context() as broken:
            broken.setattr(enhancer, "process", lambda *_: 1 / 0)
            response = service.enhance(encoded(recording(0.1)))
        assert_problem(response, 500, "internal")
        assert "division" not in response.text
        assert service.enhance(encoded(recording(0.1))).status_code == 200


# Many at once


def test_a_long_file_delays_neither_a_short_one_nor_the_service(paced: Paced) -> None:
    """While the only worker is inside a block of a long file, probes are answered; a short file overtakes."""
    with serving(paced, file_workers=1) as service, ThreadPoolExecutor() as callers:
        long = callers.submit(service.enhance, encoded(np.zeros(60 * 48_000), 48_000, "FLAC"))
        eventually(lambda: paced.blocks == 1, "the long file's first block")
        assert service.http.get("/healthz").status_code == 200
        short = callers.submit(service.enhance, encoded(np.zeros(48_000), 48_000, "FLAC"))
        service.wait_for("percepnet_files_waiting", 1)
        paced.permits.release(8)
        assert short.result(timeout=TIMEOUT_SECONDS).status_code == 200
        assert not long.done()
        paced.permits.release(100)
        assert long.result(timeout=TIMEOUT_SECONDS).status_code == 200


def test_files_that_share_the_service_come_out_as_if_alone(service: Service, enhancer: Enhancer) -> None:
    contents = [
        encoded(recording(0.2 * (i + 1), RATE + 8000 * (i % 3)), RATE + 8000 * (i % 3)) for i in range(8)
    ]
    with ThreadPoolExecutor(8) as callers:
        responses = list(callers.map(service.enhance, contents))
    for content, response in zip(contents, responses, strict=True):
        assert response.content == enhanced_by_library(enhancer, content, "wav")


def test_one_file_too_many_is_told_when_to_come_back(paced: Paced) -> None:
    with serving(paced, max_requests=1) as service, ThreadPoolExecutor() as callers:
        content = encoded(recording(0.1))
        first = callers.submit(service.enhance, content)
        eventually(lambda: paced.blocks == 1, "the first file")
        response = service.enhance(content)
        assert_problem(response, 503, "busy")
        assert int(response.headers["retry-after"]) > 0
        assert service.http.get("/readyz").status_code == 200
        paced.permits.release(100)
        assert first.result(timeout=TIMEOUT_SECONDS).status_code == 200
        assert service.enhance(content).status_code == 200


def posted(content: bytes) -> bytes:
    return post_head(len(content)) + content


def test_a_caller_who_hangs_up_stops_the_work(paced: Paced) -> None:
    with serving(paced) as service:
        connection = service.send(posted(encoded(np.zeros(60 * 48_000), 48_000, "FLAC")))
        eventually(lambda: paced.blocks == 1, "the first block")
        connection.close()

        def stopped() -> bool:
            paced.permits.release(1)  # the hang-up is seen some blocks later
            return service.metric("percepnet_files_accepted") == 0

        eventually(stopped, "the end of the work")
        assert service.metric('percepnet_http_errors_total{code="client_gone"}') == 1


def test_a_caller_who_hangs_up_during_the_upload_leaves_nothing(service: Service) -> None:
    before = service.metric('percepnet_http_errors_total{code="client_gone"}')
    service.send(posted(bytes(1 << 20))[:-1]).close()
    service.wait_for('percepnet_http_errors_total{code="client_gone"}', before + 1)
    service.wait_for("percepnet_files_accepted", 0)


def test_a_caller_who_does_not_take_the_answer_is_given_up(paced: Paced) -> None:
    paced.permits.release(10_000)
    with serving(paced, transfer_timeout_seconds=1) as service:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(service.address)
        connection.sendall(posted(encoded(np.zeros((60 * 48_000, 4)), 48_000, "FLAC")))
        service.wait_for('percepnet_http_errors_total{code="client_gone"}', 1)
        service.wait_for("percepnet_files_accepted", 0)
        connection.close()


def test_stopping_lets_the_accepted_file_finish(paced: Paced) -> None:
    with ThreadPoolExecutor() as callers, serving(paced) as service:
        answer = callers.submit(service.enhance, encoded(recording(0.1)))
        eventually(lambda: paced.blocks == 1, "the first block")
        service.server.handle_exit(15, None)
        eventually(lambda: not service.server.servers[0].is_serving(), "closed doors")
        paced.permits.release(100)
        assert answer.result(timeout=TIMEOUT_SECONDS).status_code == 200


def test_the_grace_after_which_work_is_dropped_is_kept(paced: Paced) -> None:
    with ThreadPoolExecutor() as callers:
        with serving(paced, shutdown_grace_seconds=0.1) as service:
            answer = callers.submit(service.enhance, encoded(np.zeros(60 * 48_000), 48_000, "FLAC"))
            eventually(lambda: paced.blocks == 1, "the first block")
            threading.Timer(2.0, paced.permits.release, [3]).start()
        assert_problem(answer.result(timeout=TIMEOUT_SECONDS), 503, "stopping")
        assert paced.blocks <= 4


def test_scripts_of_the_chosen_web_pages_may_send_files(enhancer: Enhancer) -> None:
    ours, other = {"Origin": "https://calls.example"}, {"Origin": "https://other.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    name = "access-control-allow-origin"
    with serving(enhancer, cors_origins=Origins((ours["Origin"],))) as service:
        preflight = service.http.options("/enhance", headers=ours | asks)
        assert (preflight.status_code, preflight.headers[name]) == (200, ours["Origin"])
        refused = service.http.post("/enhance", content=b"no audio", headers=ours)
        assert (refused.status_code, refused.headers[name]) == (415, ours["Origin"])
        assert name not in service.http.post("/enhance", content=b"no audio", headers=other).headers
    with serving(enhancer) as service:
        assert service.http.options("/enhance", headers=ours | asks).status_code == 405


def test_requests_leave_no_open_file_behind(service: Service) -> None:
    """Uploads and results beyond 1 MB lie on the disk without a name; closing them is all there is to do."""
    large = encoded(recording(9.5, 96_000), 96_000)
    directory = os.environ.get("TMPDIR", "/tmp")
    before, names = psutil.Process().num_fds(), set(os.listdir(directory))
    for content in (large, large[: 3 << 19], encoded(recording()), bytes(3 << 20)):
        response = service.http.post("/enhance", files={"file": content}, headers={"Connection": "close"})
        assert response.status_code in (200, 400, 413)
    eventually(lambda: psutil.Process().num_fds() <= before, "as many open files as before")
    assert set(os.listdir(directory)) <= names


# What the service tells of itself


def test_liveness_and_readiness(random_model: Model) -> None:
    with serving(Enhancer(random_model)) as service:
        assert service.http.get("/healthz").json() == {"status": "ok"}
        assert service.http.get("/readyz").json() == {"status": "ready"}
        service.server.health.stopping = True
        assert service.http.get("/healthz").status_code == 200
        response = service.http.get("/readyz")
        assert (response.status_code, response.json()) == (503, {"status": "stopping"})


def test_load_balancers_may_ask_with_head(random_model: Model) -> None:
    """It gets the answer to GET but for the body."""
    with serving(Enhancer(random_model)) as service:
        for stopping in (False, True):
            service.server.health.stopping = stopping
            for path in ("/healthz", "/readyz"):
                got, asked = service.http.get(path), service.http.head(path)
                assert (asked.status_code, asked.content) == (got.status_code, b"")
                assert asked.headers["content-length"] == got.headers["content-length"]


def test_the_model_is_described(service: Service, random_model: Model) -> None:
    model = service.http.get("/v1/model").json()
    assert model["sha256"] == random_model.manifest.sha256
    assert model["precision"] == "int8"
    assert (model["sample_rate"], model["latency_seconds"]) == (48_000, 0.03)
    assert "feature_mean" not in model


def test_metrics_count_what_was_done(enhancer: Enhancer) -> None:
    with serving(enhancer, max_requests=5) as service:
        content = encoded(recording(1.0, channels=2))
        size = len(service.enhance(content).content)
        service.enhance(b"x")
        prefix = "percepnet_http_request_duration_seconds_count"
        service.wait_for(f'{prefix}{{route="/enhance",status="415"}}', 1)
        assert service.metric(f'{prefix}{{route="/enhance",status="200"}}') == 1
        assert service.metric('percepnet_http_request_size_bytes_sum{route="/enhance"}') == len(content) + 1
        assert service.metric('percepnet_http_response_size_bytes_sum{route="/enhance"}') > size
        assert service.metric('percepnet_http_errors_total{code="not_audio"}') == 1
        assert service.metric("percepnet_file_audio_seconds_total") == 2.0
        assert service.metric("percepnet_file_cpu_seconds_total") > 0
        assert service.metric("percepnet_files_capacity") == 5
        response = service.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert 'percepnet_build_info{model="random",model_version="0",precision="int8"' in response.text
        assert "process_cpu_seconds_total" in response.text


def test_all_that_a_file_takes_is_booked_as_files(service: Service) -> None:
    """Decoding, resampling and encoding too, which is half of it here."""

    def taken() -> tuple[float, float]:
        booked = service.metric('percepnet_cpu_seconds_total{stage="files"}')
        return booked, service.metric("percepnet_file_cpu_seconds_total")

    before = taken()
    assert service.enhance(encoded(recording(9, 44_100), 44_100), format="ogg").status_code == 200
    booked, in_all = np.subtract(taken(), before)
    assert in_all > 0
    assert booked >= in_all


def test_each_request_leaves_one_line_of_json_without_audio(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    content = encoded(recording(0.5))
    with caplog.at_level(logging.INFO, "percepnet.service"):
        service.enhance(content, mix=0.5)
        service.enhance(content, mix=2)
        service.http.get("/healthz")
        eventually(lambda: len(caplog.records) >= 2, "the log lines")
    good, bad = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    assert (good["status"], good["audio_seconds"], good["sample_rate_hz"]) == (200, 0.5, RATE)
    assert good["request_bytes"] == len(content)
    assert (bad["status"], bad["error"]) == (422, "bad_parameter")
    assert good["process"] == os.getpid()
    assert all(len(json.dumps(line)) < 500 for line in (good, bad))


def test_a_failure_is_logged_on_one_line_with_its_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed: %s", ("why",), info)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: why"
    assert "ValueError" in json.loads(line)["traceback"]


def test_the_openapi_document_tells_all_of_enhance(service: Service) -> None:
    operation = service.http.get("/openapi.json").json()["paths"]["/enhance"]["post"]
    parameters = {parameter["name"]: parameter["schema"] for parameter in operation["parameters"]}
    assert parameters.keys() == {"format", "attenuation_limit_db", "mix", "postfilter"}
    ranges = {"attenuation_limit_db": (0, 100), "mix": (0, 1), "postfilter": (0, 1)}
    for name, default in asdict(Controls()).items():
        schema = parameters[name]
        assert (schema["minimum"], schema["maximum"]) == ranges[name]
        assert (schema["type"], schema["default"]) == ("number", default)
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["format"] == "binary"
    assert "audio/flac" in operation["requestBody"]["content"]
    statuses = {str(answer.http_status) for answer in ANSWERS.values()} - {"409", "499"}
    assert set(operation["responses"]) == {"200", *statuses}
    assert "PercepNet-Real-Time-Factor" in operation["responses"]["200"]["headers"]
    for status in statuses:
        assert set(operation["responses"][status]["content"]) == {"application/problem+json"}


def test_the_documentation_page_needs_no_other_host(service: Service) -> None:
    page = service.http.get("/docs").text
    assets = [part.split('"')[0] for part in page.replace("href=", "src=").split('src="')[1:]]
    assert len(assets) >= 2
    for asset in assets:
        assert asset.startswith("/")
        assert service.http.get(asset).status_code == 200
    assert "http://" not in page
    assert "https://" not in page


# Fuzzing: the file or a declared problem, never a 500, never a hang

SEEDS = [
    encoded(recording(0.2)),
    encoded(recording(0.2, channels=2), subtype="FLOAT"),
    encoded(recording(0.2), format="FLAC"),
    encoded(recording(0.2), format="OGG"),
    encoded(recording(0.2), format="OGG", subtype="OPUS"),
    encoded(recording(0.2), format="MP3"),
]
DECLARED = {200, 400, 413, 415}


@settings(max_examples=30, deadline=None)
@given(start=st.sampled_from([b"", *(seed[:12] for seed in SEEDS)]), rest=st.binary(max_size=400))
def test_random_bytes_are_answered(service: Service, start: bytes, rest: bytes) -> None:
    assert service.enhance(start + rest).status_code in DECLARED


@settings(max_examples=60, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), max_size=6),
    header_changes=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=2),
    end=st.integers(0, 8000),
)
def test_damaged_files_are_answered(
    service: Service,
    seed: bytes,
    changes: list[tuple[int, int]],
    header_changes: list[tuple[int, int]],
    end: int,
) -> None:
    damaged = bytearray(seed)
    for position, value in (*changes, *header_changes):
        damaged[position % len(damaged)] = value
    response = service.enhance(bytes(damaged[: end or None]))
    assert response.status_code in DECLARED
    if response.status_code == 200:
        assert np.isfinite(decoded(response.content)).all()


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"--b\r\n" + FILE_PART.encode() + b"\r\n"]))
def test_random_forms_are_answered(service: Service, content: bytes, start: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = service.http.post("/enhance", content=start + content, headers=headers)
    assert response.status_code in DECLARED | {422}
