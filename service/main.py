"""The composition root: settings → model → engine → REST and gRPC servers."""

import argparse
import asyncio
import os
import sys
from contextlib import suppress
from socket import socket
from types import FrameType

import numpy as np
import uvicorn

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model, ModelError
from service import logs
from service.behind_live import BehindLive
from service.engine import Engine
from service.grpc_server import GrpcServer
from service.health import Health
from service.metrics import Metrics
from service.rest import create_app
from service.settings import Settings, SettingsError, add_arguments, unknown_variables

__all__ = ["Server", "add_arguments", "run"]


class Server(uvicorn.Server):
    """The HTTP and gRPC servers around one engine; they stop being ready as soon as they are told to stop."""

    def __init__(self, settings: Settings, enhancer: Enhancer) -> None:
        self.health = Health()
        metrics = Metrics(enhancer.model)
        engine = Engine(enhancer, settings.max_streams, metrics)
        metrics.streams_capacity.set(engine.capacity)
        metrics.streams_active.set_function(lambda: engine.active)
        metrics.queue_frames.set_function(lambda: engine.queued_frames)
        metrics.workers.set(1)
        self._load = metrics.load
        files = BehindLive(enhancer, engine)
        self.grpc = GrpcServer(settings, engine, files, metrics)
        super().__init__(
            uvicorn.Config(
                create_app(settings, files, self.health, metrics),
                host=settings.http_listen.host,
                port=settings.http_listen.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.shutdown_grace_seconds,  # type: ignore[arg-type]
            )
        )

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen on both ports; ends the process if one of them cannot be had."""
        try:
            await self.grpc.start(self.health)
        except RuntimeError as error:
            logs.logger.error("cannot listen for gRPC, --grpc-listen chooses another port: %s", error)
            raise SystemExit(1) from error
        try:
            await super().startup(sockets)
        except SystemExit:
            await self.grpc.stop()
            raise
        self._sampler = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._load.sample()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Let files and live streams end, within the grace."""
        self.health.stopping = True
        self._sampler.cancel()
        await asyncio.gather(super().shutdown(sockets), self.grpc.stop())

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
