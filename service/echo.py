"""A gRPC server that sends audio back as it came: what the transport costs without an engine."""

import argparse
import asyncio
from typing import Any

import grpc

from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Address


async def echo(_: Any, context: grpc.aio.ServicerContext) -> None:
    """Serve one EnhanceStream."""
    while (data := await context.read()) is not grpc.aio.EOF:
        request = pb.EnhanceStreamRequest.FromString(data)
        if request.HasField("config"):
            response = pb.EnhanceStreamResponse(started=pb.StreamStarted(config=request.config))
        else:
            audio = pb.EnhancedAudio(audio=request.audio, flushed=request.HasField("end"))
            response = pb.EnhanceStreamResponse(audio=audio)
        await context.write(response.SerializeToString())


async def serve(listen: Address) -> None:
    """Serve until the process ends."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0), ("grpc.http2.bdp_probe", 0)))
    handlers = {"EnhanceStream": grpc.stream_stream_rpc_method_handler(echo)}
    name = pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_insecure_port(str(listen))
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--grpc-listen", type=Address.parse, required=True)
    asyncio.run(serve(parser.parse_args().grpc_listen))
