"""A client of the gRPC interface: live streams and short clips, from plain Python and from asyncio."""

from percepnet.errors import ParameterError
from service.client.aio import AsyncClient, AsyncLiveStream
from service.client.conversation import Answer, EndedError, Mark, TurnError
from service.client.pods import CallError, Tls
from service.client.sync import Client, LiveStream

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncLiveStream",
    "CallError",
    "Client",
    "EndedError",
    "LiveStream",
    "Mark",
    "ParameterError",
    "Tls",
    "TurnError",
]
