"""Whether a worker listens for gRPC connections."""

import asyncio

import grpc
import pytest

from service import board, listener
from service.board import Board
from service.listener import Listener


class Servers:
    """Makes servers that do not serve, and knows which of them listen."""

    def __init__(self) -> None:
        self.listening: list[grpc.aio.Server] = []

    def build(self) -> grpc.aio.Server:
        servers, server = self.listening, grpc.aio.server()

        class Server:
            async def start(self) -> None:
                await asyncio.sleep(0.02)  # while it starts, streams come to the others
                servers.append(server)

            async def stop(self, grace: float) -> None:
                if server in servers:
                    servers.remove(server)

        return Server()  # type: ignore[return-value]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board of two workers that carry four streams each, as the first one sees it."""
    monkeypatch.setattr(listener, "CHECK_SECONDS", 0.03)
    workers = Board(2, 0, board.shared_file(2))
    for slot in workers.slots:
        slot.ready, slot.capacity = 1, 4
    return workers


def test_a_full_worker_leaves_and_comes_back_once(workers: Board) -> None:
    """However many streams come meanwhile: a second server would listen for ever, full or not."""
    servers = Servers()

    async def main() -> None:
        this = Listener(servers.build, workers)
        await this.start()
        for _ in range(3):
            assert len(servers.listening) == 1
            workers.mine.streams = 4
            for _ in range(8):
                this.stream_opened()
            await asyncio.sleep(3 * listener.QUIET_SECONDS)
            assert servers.listening == []
            workers.mine.streams = 0
            for _ in range(8):
                this.stream_opened()
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        assert len(servers.listening) == 1
        await this.stop(0)
        assert servers.listening == []

    asyncio.run(main())


def test_a_full_worker_listens_while_no_other_has_room(workers: Board) -> None:
    servers = Servers()
    workers.slots[1].streams = workers.mine.streams = 4

    async def main() -> None:
        this = Listener(servers.build, workers)
        await this.start()
        this.stream_opened()
        await asyncio.sleep(0.1)
        assert len(servers.listening) == 1
        await this.stop(0)

    asyncio.run(main())


def test_streams_without_a_pause_do_not_keep_a_full_worker_listening(workers: Board) -> None:
    servers = Servers()
    workers.mine.streams = 4

    async def main() -> None:
        this = Listener(servers.build, workers)
        await this.start()
        for _ in range(100):
            this.stream_opened()
            await asyncio.sleep(0.005)
        assert servers.listening == []
        await this.stop(0)

    asyncio.run(main())
