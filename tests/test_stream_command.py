"""`percepnet stream`: live streams give what `percepnet enhance` gives for a file, or one line of error."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import trustme
from running import running

from percepnet.cli import main
from percepnet.enhancer import Enhancer
from percepnet.stream import enhance_file
from percepnet.synthesis import Controls
from service import keys


@pytest.fixture(scope="module")
def target(enhancer: Enhancer) -> Iterator[str]:
    with running(enhancer, max_streams=4) as server:
        yield f"127.0.0.1:{server.grpc.port}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, rate: int = 16_000, channels: int = 1, subtype: str | None = None) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal((rate // 3 + 7, channels))
    soundfile.write(name, samples, rate, subtype)


@pytest.mark.parametrize("options", [[], ["--realtime"]])
@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 8_000, 1, "PCM_16"),
        ("a.wav", 22_050, 3, "FLOAT"),
        ("a.flac", 96_000, 2, "PCM_24"),
        ("a.mp3", 48_000, 1, None),
    ],
)
def test_the_output_is_that_of_enhancing_the_file(
    folder, target, enhancer, capsys, name, rate, channels, subtype, options
):
    put(name, rate, channels, subtype)
    output = "out.wav" if name.endswith("mp3") else f"out{Path(name).suffix}"
    assert main(["stream", name, output, "--target", target, "--attenuation-limit-db", "20", *options]) == 0
    enhance_file(name, f"expected_{output}", controls=Controls(20), enhancer=enhancer)
    for found, expected in zip(soundfile.read(output), soundfile.read(f"expected_{output}"), strict=True):
        np.testing.assert_array_equal(found, expected)  # samples and rate
    assert soundfile.info(output).subtype == soundfile.info(f"expected_{output}").subtype
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert f"{name} → {output}: 0.3 s, {channels} channel" in told
    assert "ms of delay taken out" in told
    assert ("answers after" in told) == bool(options)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["a.wav", "out.wav", "--target", "nowhere"], 2, "the target 'nowhere'; accepted is HOST:PORT"),
        (["a.wav", "out.wav", "--target", "127.0.0.1:9"], 1, "a.wav: 127.0.0.1:9: failed to connect"),
        (["a.wav", "a.wav"], 1, "a.wav: a.wav is the recording itself"),
        (["a.wav", ""], 2, "IN or OUT is empty"),
        (["none.wav", "out.wav"], 1, "percepnet: none.wav: No such file"),
        (["a.wav", "out.wav", "--api-key", "schlüssel"], 2, "the API key cannot be sent"),
        (["many.wav", "out.wav"], 1, "4 live streams of this server are taken (RESOURCE_EXHAUSTED)"),
        (["cut.wav", "out.wav"], 1, "cut.wav: sample 100"),
        (["a.wav", "out.wav", "--root-certificates", "none.pem"], 2, "none.pem: No such file"),
        (["a.wav", "out.wav", "--certificate", "a.wav"], 2, "the key is missing"),
        (["a.wav", "out.wav", "--key", "a.wav"], 2, "the certificate is missing"),
        (["a.wav", "out.wav", "--root-certificates", "a.wav"], 2, "there must be certificates in a.wav"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, target, capsys, monkeypatch, arguments, status, message):
    monkeypatch.setattr("service.client.command.PATIENCE_SECONDS", 0.2)
    put("a.wav")
    put("many.wav", channels=5)
    samples = np.zeros(8_000)
    samples[100] = np.nan
    soundfile.write("cut.wav", samples, 16_000, "FLOAT")
    before = set(folder.iterdir())
    choice = [] if "--target" in arguments else ["--target", target]
    assert main(["stream", *arguments, *choice]) == status
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("out", ["new/deep/a.wav", "new/", "there"])
def test_out_may_be_a_folder_or_in_a_new_one(folder, target, out):
    put("a.wav")
    (folder / "there").mkdir()
    assert main(["stream", "a.wav", out, "--target", target]) == 0
    written = folder / out if out.endswith(".wav") else folder / out / "a.wav"
    assert soundfile.info(written).frames == soundfile.info("a.wav").frames


def test_several_files_go_into_a_folder(folder, target, capsys):
    """What fails is named, and the others are done."""
    put("a.wav")
    put("b.flac")
    Path("bad.wav").write_bytes(b"no audio")
    assert main(["stream", "*.wav", "b.flac", "out", "--target", target]) == 1
    assert {path.name for path in (folder / "out").iterdir()} == {"a.wav", "b.flac"}
    assert "bad.wav: the file is not audio" in capsys.readouterr().err


def test_key_and_certificate_are_used(folder, enhancer, monkeypatch, capsys):
    authority, key = trustme.CA(), "0123456789abcdef0123456789abcdef"
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path("authority.pem")
    certificate.private_key_pem.write_to_path("key.pem")
    certificate.cert_chain_pems[0].write_to_path("cert.pem")
    put("a.wav")
    choices = {"api_keys": keys.parse(f"me:{key}"), "tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}
    with running(enhancer, **choices) as server:
        command = ["stream", "a.wav", "out.wav", "--target", f"127.0.0.1:{server.grpc.port}"]
        assert main([*command, "--root-certificates", "authority.pem"]) == 1
        assert "UNAUTHENTICATED" in capsys.readouterr().err
        monkeypatch.setenv("PERCEPNET_API_KEY", key)
        assert main([*command, "--root-certificates", "authority.pem"]) == 0
