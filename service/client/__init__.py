"""A client of the gRPC interface: live streams and short clips, from plain Python and from asyncio."""

from service.client.aio import AsyncClient, AsyncLiveStream
from service.client.conversation import Answer, BusyError, EndedError, Mark
from service.client.pods import Tls
from service.client.sync import Client, LiveStream

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncLiveStream",
    "BusyError",
    "Client",
    "EndedError",
    "LiveStream",
    "Mark",
    "Tls",
]
