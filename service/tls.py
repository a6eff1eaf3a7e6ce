"""TLS from files, for both servers; certificates that change are used from the next connection on."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from service.settings import Settings
from service.watched import Watched


@dataclass(frozen=True)
class _Certificates:
    """One state of the files, as each server wants it."""

    for_http: ssl.SSLContext
    for_grpc: grpc.ServerCertificateConfiguration


class Tls:
    """Certificate, key and client CA of a deployment.

    With a client CA, gRPC refuses callers without a certificate in the handshake. Over HTTP the handshake
    lets them through, for the probes that have none; `Access` asks the others. Raises FilesError if a file
    cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self.wants_clients = client_ca is not None

        def read() -> _Certificates:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key, password="")  # or it would ask at the terminal
            if client_ca is not None:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_OPTIONAL
                # Who resumed a session would be let in by the authority of its beginning; TLS 1.2 has more
                # ways to do so than can be closed.
                context.num_tickets = 0
                context.minimum_version = ssl.TLSVersion.TLSv1_3
            pair = key.read_bytes(), cert.read_bytes()
            roots = None if client_ca is None else client_ca.read_bytes()
            return _Certificates(context, grpc.ssl_server_certificate_configuration([pair], roots))

        self._files = Watched([cert, key, *([client_ca] if client_ca else [])], read)

    @classmethod
    def of(cls, settings: Settings) -> "Tls | None":
        """As a deployment wants it; None for servers without TLS."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    def http_context(self, *_: object) -> ssl.SSLContext:
        """A context whose every handshake goes on with the newest certificates.

        It takes what uvicorn's `ssl_context_factory` is given, and needs none of it.
        """

        def newest(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = self._files.value.for_http

        context = self._files.value.for_http
        context.sni_callback = newest  # OpenSSL calls it in every handshake, a server's name in it or not
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials that look for the newest certificates in every handshake."""
        used = self._files.value.for_grpc

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            before, used = used, self._files.value.for_grpc
            return None if used is before else used

        return grpc.dynamic_ssl_server_credentials(used, newest, self.wants_clients)
