"""The settings of a deployment: where they come from, and what is refused."""

import argparse
from pathlib import Path

import pytest

from service import cores
from service.settings import Address, Origins, Settings, SettingsError, add_arguments, unknown_variables


def flags(*command_line: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(command_line))


def test_nothing_given_means_the_defaults() -> None:
    settings = Settings.load({}, flags())
    assert settings == Settings()
    assert settings.http_listen == Address("0.0.0.0", 8080)
    assert settings.file_workers >= 1


def test_the_environment_sets_every_kind_of_value() -> None:
    settings = Settings.load(
        {
            "PERCEPNET_HTTP_LISTEN": "127.0.0.1:9000",
            "PERCEPNET_MODEL": "models/night",
            "PERCEPNET_MAX_REQUESTS": "7",
            "PERCEPNET_MAX_DURATION_SECONDS": "2.5",
            "PERCEPNET_LOG_LEVEL": "WARNING",
            "PERCEPNET_CORS_ORIGINS": "https://calls.example, http://localhost:3000",
            "UNRELATED": "1",
        },
        {},
    )
    assert settings == Settings(
        http_listen=Address("127.0.0.1", 9000),
        model=Path("models/night"),
        max_requests=7,
        max_duration_seconds=2.5,
        log_level="warning",
        cors_origins=Origins(("https://calls.example", "http://localhost:3000")),
    )


def test_a_flag_wins_over_the_environment() -> None:
    environment = {"PERCEPNET_MAX_UPLOAD_MIB": "1", "PERCEPNET_MAX_CHANNELS": "3"}
    settings = Settings.load(environment, flags("--max-upload-mib", "2"))
    assert (settings.max_upload_mib, settings.max_channels) == (2, 3)


def test_an_empty_text_counts_as_not_given() -> None:
    assert Settings.load({"PERCEPNET_MODEL": ""}, {}).model is None


def test_flags_of_other_commands_are_not_settings() -> None:
    assert Settings.load({}, {"command": "serve"}) == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HTTP_LISTEN", "8080"),
        ("HTTP_LISTEN", "localhost:http"),
        ("HTTP_LISTEN", "localhost:65536"),
        ("HTTP_LISTEN", "tcp://10.0.0.1:8080"),
        ("HTTP_LISTEN", "::1:8080"),
        ("WORKERS", "0"),
        ("WORKERS", str(8 * len(cores.usable()) + 1)),
        ("FILE_WORKERS", "0"),
        ("FILE_WORKERS", "two"),
        ("MAX_REQUESTS", "-1"),
        ("MAX_UPLOAD_MIB", "1.5"),
        ("MAX_CHANNELS", "²"),
        ("MAX_DURATION_SECONDS", "0"),
        ("MAX_DURATION_SECONDS", "nan"),
        ("TRANSFER_TIMEOUT_SECONDS", "inf"),
        ("SHUTDOWN_GRACE_SECONDS", "soon"),
        ("CORS_ORIGINS", "calls.example"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"PERCEPNET_{name}=.*expected"):
        Settings.load({f"PERCEPNET_{name}": text}, {})
    flag = "--" + name.lower().replace("_", "-")
    with pytest.raises(SettingsError, match=f"{flag}=.*expected"):
        Settings.load({}, flags(f"{flag}={text}"))


@pytest.mark.parametrize(
    ("text", "host", "written"),
    [
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.1:0"),
        ("[::1]:80", "::1", "[::1]:80"),
        (":8080", "0.0.0.0", "0.0.0.0:8080"),
    ],
)
def test_addresses_are_read_and_written(text: str, host: str, written: str) -> None:
    address = Address.parse(text)
    assert address.host == host
    assert str(address) == written


@pytest.mark.parametrize("name", ["MAX_STREAMS_PER_KEY", "MAX_REQUESTS_PER_KEY"])
def test_a_limit_for_each_key_without_keys_is_refused(name: str) -> None:
    limit = {f"PERCEPNET_{name}": "2"}
    with pytest.raises(SettingsError, match="need API keys: set PERCEPNET_API_KEYS or --api-keys-file"):
        Settings.load(limit, {})
    Settings.load(limit | {"PERCEPNET_API_KEYS": "radio:0123456789abcdef0123456789abcdef"}, {})
    Settings.load(limit, flags("--api-keys-file", "keys"))


def test_settings_cannot_change() -> None:
    with pytest.raises(AttributeError):
        Settings().max_requests = 3  # type: ignore[misc]


def test_a_mistyped_name_in_the_environment_is_noticed() -> None:
    environment = {"PERCEPNET_MAX_UPLAOD_MIB": "1", "PERCEPNET_MODEL": "x", "HOME": "/"}
    assert unknown_variables(environment) == ["PERCEPNET_MAX_UPLAOD_MIB"]


def test_help_names_flag_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--max-requests" in text
    assert "(default: 32; PERCEPNET_MAX_REQUESTS)" in text
    for shown in (
        "--http-listen HOST:PORT",
        "--max-streams-per-key N",
        "--tls-key PATH",
        "--hang-seconds SECONDS",
        "--log-level LEVEL",
    ):
        assert shown in text
