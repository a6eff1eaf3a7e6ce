"""Who may use the service: API keys and certificates, from files."""

from collections.abc import Mapping

from starlette.requests import HTTPConnection

from service import keys
from service.board import Board
from service.callers import Caller, Quota
from service.errors import UnauthenticatedError
from service.settings import Address, Settings
from service.tls import Tls
from service.watched import Watched


class Access:
    """What a deployment asks of its callers; the probes, metrics and documentation of a process ask nothing.

    board: of the workers that limits count over.
    Raises FilesError if the keys or the certificates cannot be used.
    """

    def __init__(self, settings: Settings, board: Board | None = None) -> None:
        self.tls = Tls.of(settings)
        self._keys = settings.api_keys
        file = settings.api_keys_file
        self._key_file = None if file is None else Watched([file], lambda: keys.parse(file.read_text()))
        self.files = Quota(settings.max_requests_per_key, "files with one API key", board)
        self.streams = Quota(settings.max_streams_per_key, "live streams with one API key", board)
        self.connection_streams = Quota(
            settings.max_streams_per_connection, "live streams over one connection"
        )

    def caller(self, peer: str, headers: Mapping[str, str]) -> Caller:
        """Who sends a request with these headers, names in lower case; raises UnauthenticatedError."""
        return Caller.of(peer, self._key_name(headers), headers)

    def http_caller(self, connection: HTTPConnection, headers: Mapping[str, str] | None = None) -> Caller:
        """Who sends a request over HTTP; raises UnauthenticatedError. headers: in place of the request's."""
        # The handshake lets probes without a certificate through; one that is there was verified.
        certified = connection.state.transport.get_extra_info("peercert")
        if self.tls is not None and self.tls.wants_clients and not certified:
            raise UnauthenticatedError("this service accepts only callers with a client certificate")
        return self.caller(peer_of(connection), connection.headers if headers is None else headers)

    def _key_name(self, headers: Mapping[str, str]) -> str | None:
        """The name of the key that came; None if none is wanted."""
        entries = self._keys + (() if self._key_file is None else self._key_file.value)
        if not entries:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if not key:
            raise UnauthenticatedError("no API key came; send authorization: Bearer KEY, or x-api-key: KEY")
        name = keys.find(entries, key.strip())
        if name is None:
            raise UnauthenticatedError("the API key is not known here")
        return name


def peer_of(connection: HTTPConnection) -> str:
    """Address and port at the other end."""
    client = connection.client
    return str(Address(*client)) if client else "unknown"
