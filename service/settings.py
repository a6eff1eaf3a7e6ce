"""What a deployment may choose: `PERCEPNET_*` in the environment, then command-line flags, read here only."""

import argparse
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args

from service import cores, keys

PREFIX = "PERCEPNET_"
LOG_LEVELS = ("debug", "info", "warning", "error")


class SettingsError(ValueError):
    """A setting has a value that cannot be meant; the message names it and what is accepted."""


@dataclass(frozen=True)
class Address:
    """Where a server listens; port 0 lets the system choose a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `HOST:PORT`; an IPv6 host stands in brackets, and an empty host means every interface."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535:
            raise ValueError("HOST:PORT with a port from 0 to 65535")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError("HOST:PORT with an IPv6 host in brackets")
        return cls(host or "0.0.0.0", int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.strip().lstrip("+-").isdecimal() else minimum - 1
        if value < minimum:
            raise ValueError(f"a whole number from {minimum} up")
        return value

    return parse


MAX_WORKERS = 8 * len(cores.usable())
"""More only take each other's time."""


def _workers(text: str) -> int:
    value = _whole(1)(text)
    if value > MAX_WORKERS:
        raise ValueError(f"at most {MAX_WORKERS}: 8 for each core that the process may use")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("a finite number of seconds above 0")
    return value


def _hang_seconds(text: str) -> float:
    value = _seconds(text)
    if value < 2:
        raise ValueError("at least 2 seconds: workers give a sign of life every second")
    return value


@dataclass(frozen=True)
class Origins:
    """Web origins as browsers name them, or `*` for all."""

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read them with commas between."""
        names = tuple(name.strip() for name in text.split(","))
        if not all(name == "*" or re.fullmatch(r"https?://[^\s/]+", name) for name in names):
            raise ValueError("* or https://HOST[:PORT], several with commas between")
        return cls(names)


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def _meaning(
    parse: Callable[[str], Any], meaning: str, *, unset: str = "none", secret: bool = False
) -> dict[str, Any]:
    """unset: what no value means, in words. secret: no flag, which all on the machine can see, and in no
    message."""
    return {"parse": parse, "meaning": meaning, "unset": unset, "secret": secret}


_METAVARS = {Address: "HOST:PORT", Path: "PATH", int: "N", float: "SECONDS", str: "LEVEL", Origins: "ORIGINS"}


@dataclass(frozen=True)
class Settings:
    """Every choice of a deployment, checked.

    The field `max_upload_mib` is `PERCEPNET_MAX_UPLOAD_MIB` in the environment and `--max-upload-mib` a flag.
    """

    http_listen: Address = field(
        default=Address("0.0.0.0", 8080),
        metadata=_meaning(Address.parse, "address of the HTTP server, HOST:PORT"),
    )
    grpc_listen: Address = field(
        default=Address("0.0.0.0", 50051),
        metadata=_meaning(Address.parse, "address of the gRPC server, HOST:PORT"),
    )
    model: Path | None = field(
        default=None,
        metadata=_meaning(
            Path, "a model.onnx or its folder, in place of the bundled model", unset="the bundled one"
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=_meaning(
            _workers, "processes that serve", unset="one for each core that the process may use"
        ),
    )
    file_workers: int = field(
        default=cores.count(), metadata=_meaning(_whole(1), "files worked on at the same instant")
    )
    max_requests: int = field(
        default=32,
        metadata=_meaning(_whole(1), "files held at once, from upload to answer; more are told to come back"),
    )
    max_upload_mib: int = field(default=512, metadata=_meaning(_whole(1), "largest upload in MiB"))
    max_result_mib: int = field(default=2048, metadata=_meaning(_whole(1), "largest enhanced file in MiB"))
    max_duration_seconds: float = field(
        default=3600.0, metadata=_meaning(_seconds, "longest recording in seconds")
    )
    max_channels: int = field(default=8, metadata=_meaning(_whole(1), "most channels of a recording"))
    transfer_timeout_seconds: float = field(
        default=30.0,
        metadata=_meaning(
            _seconds, "longest wait in seconds for a caller to begin, or to send or take a piece of a file"
        ),
    )
    max_streams: int | None = field(
        default=None,
        metadata=_meaning(
            _whole(1),
            "live streams at once, all workers together; more are told to come back",
            unset="as many as are found to fit at the start",
        ),
    )
    connection_age_seconds: float | None = field(
        default=None,
        metadata=_meaning(
            _seconds,
            "time in seconds after which gRPC callers open further streams over a new connection, so that "
            "they find new servers",
            unset="5 with several workers, no limit with one",
        ),
    )
    stream_idle_seconds: float = field(
        default=30.0,
        metadata=_meaning(_seconds, "time in seconds until a stream that sends or reads nothing ends"),
    )
    stream_queue_seconds: float = field(
        default=1.0,
        metadata=_meaning(_seconds, "audio in seconds that a stream may have unanswered"),
    )
    shutdown_grace_seconds: float = field(
        default=30.0,
        metadata=_meaning(_seconds, "time in seconds for held files and live streams to end after SIGTERM"),
    )
    hang_seconds: float = field(
        default=10.0,
        metadata=_meaning(
            _hang_seconds,
            "time in seconds after which one of several workers that gives no sign of life is replaced",
        ),
    )
    max_streams_per_connection: int | None = field(
        default=None, metadata=_meaning(_whole(1), "live streams at once over one connection")
    )
    max_streams_per_key: int | None = field(
        default=None, metadata=_meaning(_whole(1), "live streams at once with one API key")
    )
    max_requests_per_key: int | None = field(
        default=None, metadata=_meaning(_whole(1), "files held at once with one API key")
    )
    api_keys: keys.Entries = field(
        default=(),
        repr=False,
        metadata=_meaning(keys.parse, "API keys, NAME:KEY with commas between", secret=True),
    )
    api_keys_file: Path | None = field(
        default=None,
        metadata=_meaning(Path, "API keys, NAME:KEY on each line; read again when it changes"),
    )
    tls_cert: Path | None = field(
        default=None,
        metadata=_meaning(Path, "certificate chain (PEM) of both servers; read again when it changes"),
    )
    tls_key: Path | None = field(
        default=None, metadata=_meaning(Path, "private key (PEM) of the certificate, without a passphrase")
    )
    tls_client_ca: Path | None = field(
        default=None,
        metadata=_meaning(Path, "authorities (PEM) one of which must have signed a client's certificate"),
    )
    cors_origins: Origins | None = field(
        default=None,
        metadata=_meaning(Origins.parse, "web pages whose scripts may send files, as origins, or *"),
    )
    handover_keys_file: Path | None = field(
        default=None,
        metadata=_meaning(
            Path,
            "keys that all servers of a service share to hand live streams over, one on each line: the first "
            "signs, all count; read again when it changes",
            unset="none, and none is handed over",
        ),
    )
    log_level: str = field(
        default="info", metadata=_meaning(_log_level, f"least severe lines logged: {', '.join(LOG_LEVELS)}")
    )

    @classmethod
    def load(cls, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Self:
        """Read the environment, then let the flags that were given win; an empty text counts as not given.

        Raises:
            SettingsError: a value is not accepted.
        """
        chosen = {}
        for setting in fields(cls):
            variable = PREFIX + setting.name.upper()
            secret = setting.metadata["secret"]
            flag = None if secret else flags.get(setting.name)
            name, text = (variable, environ.get(variable)) if flag is None else (_flag(setting.name), flag)
            if not text:
                continue
            try:
                chosen[setting.name] = setting.metadata["parse"](text)
            except ValueError as error:
                given = name if secret else f"{name}={text!r}"
                raise SettingsError(f"{given}: expected {error}") from error
        settings = cls(**chosen)
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise SettingsError("TLS needs both, a certificate and its key; only one is set")
        if settings.tls_client_ca is not None and settings.tls_cert is None:
            raise SettingsError("a client CA needs TLS: set a certificate and its key too")
        per_key = settings.max_streams_per_key or settings.max_requests_per_key
        if per_key and not settings.api_keys and settings.api_keys_file is None:
            raise SettingsError("limits of a key need API keys: set PERCEPNET_API_KEYS or --api-keys-file")
        return settings

    @property
    def log_threshold(self) -> int:
        """The level as `logging` counts it."""
        return logging.getLevelNamesMapping()[self.log_level.upper()]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Names in the environment that carry the prefix and set nothing: probably a typing error."""
    known = {PREFIX + setting.name.upper() for setting in fields(Settings)}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting; `Settings.load` checks the values."""
    for setting in fields(Settings):
        if setting.metadata["secret"]:
            continue
        default = setting.metadata["unset"] if setting.default is None else setting.default
        parser.add_argument(
            _flag(setting.name),
            metavar=_METAVARS[(get_args(setting.type) or (setting.type,))[0]],
            help=f"{setting.metadata['meaning']} (default: {default}; {PREFIX}{setting.name.upper()})",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
