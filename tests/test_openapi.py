"""The HTTP API against its own description: what schemathesis makes of it is answered as it says.

Invariant: every answer has a declared status, content type and schema; valid requests are accepted, others
are refused.
"""

import io
from collections.abc import Iterator
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import schemathesis
import soundfile
from hypothesis import settings
from hypothesis import strategies as st
from running import TIMEOUT_SECONDS, running
from schemathesis.specs.openapi.checks import ignored_auth

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service import keys
from service.rest import create_app
from service.settings import Settings

KEY = "a-key-for-these-tests"


def recording(format: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(1_600)
    soundfile.write(file, noise, 16_000, subtype, format=format)
    return file.getvalue()


WAV, FLAC, OGG, MP3 = (recording(format) for format in ("WAV", "FLAC", "OGG", "MP3"))
RECORDINGS = st.sampled_from([WAV, FLAC, OGG, MP3, recording("OGG", "OPUS"), recording("WAV", "FLOAT")])


for kind in ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, RECORDINGS)
schemathesis.openapi.format("binary", RECORDINGS)

# The parts that requests need are of no account for the description.
DESCRIPTION = create_app(Settings(), *(Mock() for _ in range(5))).openapi()


@pytest.fixture(scope="module")
def url(random_model: Model) -> Iterator[str]:
    with running(Enhancer(random_model), api_keys=keys.parse(f"tests:{KEY}")) as server:
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"


def test_this_is_what_the_service_tells_of_itself(url: str) -> None:
    assert httpx.get(f"{url}/openapi.json").json() == DESCRIPTION


@schemathesis.openapi.from_dict(DESCRIPTION).parametrize()
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_answer_is_as_described(case: schemathesis.Case, url: str) -> None:
    excluded = [ignored_auth]  # the key is always sent; test_access.py has what happens without
    case.call_and_validate(
        base_url=url, headers={"x-api-key": KEY}, timeout=TIMEOUT_SECONDS, excluded_checks=excluded
    )
