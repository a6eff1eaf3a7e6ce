"""The composition root: settings → model → engine → REST and gRPC servers."""

import asyncio
import gc
import time
from dataclasses import replace
from itertools import cycle
from signal import SIG_DFL, SIGINT, SIGTERM, raise_signal, signal
from socket import socket
from types import FrameType

import numpy as np
import uvicorn

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model, ModelError
from service import capacity, connections, cores, logs, memory
from service.access import Access
from service.behind_live import BehindLive
from service.board import Board
from service.engine import Engine, Room
from service.files import Files
from service.grpc_server import GrpcServer
from service.health import Health
from service.metrics import Metrics
from service.rest import create_app
from service.settings import Settings, SettingsError
from service.streams import Streams
from service.watched import FilesError

FAILURES = (SettingsError, FilesError, ModelError)
"""What a service cannot start with; the message is for its operator."""


class Server(uvicorn.Server):
    """The HTTP and gRPC servers around one engine; they stop being ready as soon as they are told to stop.

    board: where the workers of a service of many processes meet. until: a file descriptor whose end is the
    sign to stop. share: of a core, or several, that this process may use.
    """

    def __init__(
        self,
        settings: Settings,
        enhancer: Enhancer,
        board: Board | None = None,
        until: int | None = None,
        share: float = 1.0,
    ) -> None:
        memory.return_large_blocks()
        connections.bound_handshakes(settings.transfer_timeout_seconds)
        self.health = Health()
        self._settings = settings
        self._board = board or Board()
        self._until = until
        self._metrics = metrics = Metrics(enhancer.model, self._board)
        engine = Engine(enhancer, _capacity(settings, enhancer, self._board, share), metrics)
        metrics.stopping = lambda: self.health.stopping
        metrics.queue_frames.set_function(lambda: engine.queued_frames)
        access = Access(settings, self._board)
        files = Files(settings, access, BehindLive(enhancer, engine), metrics)
        streams = Streams(settings, access, engine, enhancer.model.manifest, metrics)
        self.grpc = GrpcServer(settings, access, streams, files)
        super().__init__(
            uvicorn.Config(
                create_app(settings, access, files, streams, self.health, metrics),
                host=settings.http_listen.host,
                port=settings.http_listen.port,
                **connections.options(settings.transfer_timeout_seconds),
                ssl_context_factory=access.tls.http_context if access.tls else None,
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen on both ports; ends the process if one of them cannot be had."""
        try:
            await self.grpc.start(self.health)
        except RuntimeError as error:
            logs.logger.error("cannot listen for gRPC, --grpc-listen chooses another port: %s", error)
            raise SystemExit(1) from error
        if self._until is None:  # a supervisor tells it of all workers
            listen = replace(self._settings.grpc_listen, port=self.grpc.port)
            logs.logger.info("gRPC listens on %s", listen)
        cores.go_first()  # gRPC has its threads by now
        try:
            await super().startup(sockets)
        except SystemExit:
            await self.grpc.stop()
            raise
        if self._until is not None:
            asyncio.get_running_loop().add_reader(self._until, self._orphaned, self._until)
        self._keeper = asyncio.create_task(self._keep_books())
        self._board.mine.ready = 1
        gc.collect()
        gc.freeze()  # what is here now stays, and need not be looked through again and again

    async def _keep_books(self) -> None:
        """Tell the others every second that this one lives, and what it did, less often if that is little."""
        told, used_then = 0.0, 0.0
        while True:
            self._metrics.load.sample()
            self._board.mine.beats += 1
            now, used = time.monotonic(), time.process_time()
            if self._board.others and (used - used_then > 0.005 or now - told > 5):
                self._metrics.publish()  # takes about 1 ms
                told, used_then = now, used
            await asyncio.sleep(1)

    async def main_loop(self) -> None:
        """Wait until it is time to stop.

        Uvicorn looks ten times a second, which is most of what an idle service takes.
        """
        for tick in cycle((0, 1, 1, 1)):  # the first is when it does what is due every second
            if await self.on_tick(tick):
                return
            await asyncio.sleep(0.25)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Let files and live streams end, within the grace; while there are streams, HTTP tells of them."""
        self.health.stopping = True
        grace_seconds = self._settings.shutdown_grace_seconds
        logs.logger.info("stopping, within %g s", grace_seconds)
        deadline = time.monotonic() + grace_seconds
        await self.grpc.stop()
        self.config.timeout_graceful_shutdown = max(1.0, deadline - time.monotonic())  # type: ignore[assignment]
        await super().shutdown(sockets)
        self._keeper.cancel()

    def _orphaned(self, until: int) -> None:
        """Begin to stop: the supervisor is gone."""
        asyncio.get_running_loop().remove_reader(until)  # what has ended can be read for ever
        self.handle_exit(SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, on SIGTERM or SIGINT; at Ctrl-C meanwhile, end at once."""
        if self.health.stopping and sig == SIGINT:
            signal(sig, SIG_DFL)
            raise_signal(sig)
        self.health.stopping = True
        super().handle_exit(sig, frame)


def load_enhancer(settings: Settings) -> Enhancer:
    """Load the model and run it once, so that it cannot fail on the first caller; raises ModelError."""
    enhancer = Enhancer(Model.load(settings.model))
    enhancer.process(np.zeros((1, HOP), np.float32), enhancer.initial_state(1))
    return enhancer


def _capacity(settings: Settings, enhancer: Enhancer, board: Board, share: float) -> int | Room:
    """Live streams that this worker carries: its part of what was set, or as many as it can."""
    if settings.max_streams is None:
        return capacity.measure(enhancer, share)
    n_workers = len(board.slots)
    return (settings.max_streams + n_workers - 1 - board.slots.index(board.mine)) // n_workers
