"""One worker of a service of many processes, started by the supervisor."""

import os
import socket

from service import cores, logs, wakeups
from service.board import Board
from service.settings import Settings
from service.supervisor import Seat


def main(text: str) -> int:
    """Serve until told to stop, or until the supervisor is gone; returns the exit status of the process."""
    seat = Seat.parse(text)
    settings = Settings.load(os.environ, seat.flags | {"grpc_listen": seat.grpc_listen})
    logs.configure(settings.log_threshold)
    share = cores.share(seat.n_workers)
    cores.pin(seat.worker, seat.n_workers)
    cores.share_calmly()
    wakeups.read_directly()
    board = Board(seat.n_workers, seat.worker, seat.board)
    from service.main import FAILURES, Server, load_enhancer  # on the core where it will run

    try:
        server = Server(settings, load_enhancer(settings), board, until=seat.alive, share=share)
    except FAILURES as error:
        if board.mine.snapshot is None:  # the service has not started: the supervisor tells it, once
            board.mine.snapshot = str(error)
        else:
            logs.logger.error("worker cannot start: %s", error)
        return 1
    server.run([socket.socket(fileno=seat.http)])
    return 0
