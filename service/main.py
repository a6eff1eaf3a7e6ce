"""The composition root: settings → model → engine → application → server."""

import argparse
import os
import sys
from contextlib import suppress
from types import FrameType

import numpy as np
import uvicorn

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model, ModelError
from service import logs
from service.health import Health
from service.rest import create_app
from service.settings import Settings, SettingsError, add_arguments, unknown_variables

__all__ = ["Server", "add_arguments", "run"]


class Server(uvicorn.Server):
    """The HTTP server around one engine; it stops being ready as soon as it is told to stop."""

    def __init__(self, settings: Settings, enhancer: Enhancer) -> None:
        self.health = Health()
        super().__init__(
            uvicorn.Config(
                create_app(settings, enhancer, self.health),
                host=settings.http_listen.host,
                port=settings.http_listen.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_grace_seconds,  # type: ignore[arg-type]
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, on SIGTERM or SIGINT."""
        self.health.stopping = True
        super().handle_exit(sig, frame)


def load_enhancer(settings: Settings) -> Enhancer:
    """Load the model and run it once, so that it cannot fail on the first caller; raises ModelError."""
    enhancer = Enhancer(Model.load(settings.model))
    enhancer.process(np.zeros((1, HOP), np.float32), enhancer.initial_state(1))
    return enhancer


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit status of the process."""
    try:
        settings = Settings.load(os.environ, vars(args))
        logs.configure(settings.log_threshold)
        for name in unknown_variables(os.environ):
            logs.logger.warning("no such setting: %s", name)
        server = Server(settings, load_enhancer(settings))
    except (SettingsError, ModelError) as error:
        print(f"percepnet serve: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    with suppress(KeyboardInterrupt):  # the server stops in good order, then raises the signal again
        server.run()
    return 0
