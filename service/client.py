"""A client of the gRPC interface: live streams and short clips from plain Python."""

from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from percepnet.errors import ParameterError
from percepnet.synthesis import Controls
from service import pcm
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name


class LiveStream:
    """One live speaker; leave its `with` block, or call `end`, to give its place back.

    Raises grpc.RpcError from all methods: `code()` and `details()` say what the server refused.
    """

    def __init__(self, channel: grpc.Channel, config: pb.StreamConfig, timeout_seconds: float | None) -> None:
        self._requests: SimpleQueue[pb.EnhanceStreamRequest | None] = SimpleQueue()
        call = channel.stream_stream(
            f"{_SERVICE}/EnhanceStream",
            pb.EnhanceStreamRequest.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )
        self._call: Any = call(iter(self._requests.get, None), timeout=timeout_seconds)
        self.started: pb.StreamStarted = self._ask(pb.EnhanceStreamRequest(config=config)).started
        """The server's description of the stream."""
        self.last: pb.EnhancedAudio | None = None
        """The newest response with its position and its report."""

    @property
    def delay_samples(self) -> int:
        """Samples by which the output lags behind the input; left out if the delay is compensated."""
        return self.started.delay_samples

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Send samples, float32 (n,) with full scale ±1, and wait for the answer: (n,) float32.

        Raises ParameterError if n is no multiple of a stated `message_samples`: the answer would wait for
        samples that nobody sends meanwhile.
        """
        step = self.started.config.message_samples
        if step and len(samples) % step:
            raise ParameterError(f"{len(samples)} samples; this stream takes multiples of {step}")
        data = samples.astype(pcm.F32LE).tobytes()
        return self._audio(pb.EnhanceStreamRequest(audio=data))

    def update(self, controls: Controls) -> int:
        """Change the parameters; returns the number of the first input sample that they apply to."""
        return self._ask(pb.EnhanceStreamRequest(parameters=_parameters(controls))).parameters.position

    def flush(self) -> np.ndarray:
        """Return the tail of all that was sent; the next samples begin a new passage."""
        return self._audio(pb.EnhanceStreamRequest(flush=pb.Flush()))

    def end(self) -> np.ndarray:
        """Return the tail and end the stream."""
        tail = self._audio(pb.EnhanceStreamRequest(end=pb.End()))
        self._requests.put(None)
        for _ in self._call:  # the status follows
            pass
        return tail

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self._call.cancel()

    def _ask(self, request: pb.EnhanceStreamRequest) -> pb.EnhanceStreamResponse:
        self._requests.put(request)
        return next(self._call)

    def _audio(self, request: pb.EnhanceStreamRequest) -> np.ndarray:
        self.last = self._ask(request).audio
        return pcm.decode(self.last.audio, pcm.F32LE)


class Client:
    """A connection to one server, shared by any number of streams and threads.

    target: HOST:PORT. timeout_seconds: longest time for an unary call.
    """

    def __init__(self, target: str, *, timeout_seconds: float = 60.0) -> None:
        self._channel = grpc.insecure_channel(target)
        self._timeout_seconds = timeout_seconds

    def stream(
        self,
        sample_rate: int,
        *,
        controls: Controls = Controls(),
        message_samples: int = 0,
        compensate_delay: bool = False,
        report: bool = False,
        timeout_seconds: float | None = None,
    ) -> LiveStream:
        """Open a live stream; the fields are those of the proto's StreamConfig."""
        config = pb.StreamConfig(
            sample_rate_hz=sample_rate,
            encoding=pb.ENCODING_F32LE,
            parameters=_parameters(controls),
            message_samples=message_samples,
            compensate_delay=compensate_delay,
            report=report,
        )
        return LiveStream(self._channel, config, timeout_seconds)

    def enhance(
        self, samples: np.ndarray, sample_rate: int, *, controls: Controls = Controls()
    ) -> np.ndarray:
        """Enhance a clip, float32 (n,) with full scale ±1, up to a minute; as long, and not delayed."""
        request = pb.EnhanceClipRequest(
            sample_rate_hz=sample_rate,
            encoding=pb.ENCODING_F32LE,
            parameters=_parameters(controls),
            audio=samples.astype(pcm.F32LE).tobytes(),
        )
        response = self._unary("EnhanceClip", request, pb.EnhanceClipResponse)
        return pcm.decode(response.audio, pcm.F32LE)

    def status(self) -> pb.GetStatusResponse:
        """The model, the load and the capacity of the server."""
        return self._unary("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"{_SERVICE}/{method}", type(request).SerializeToString, response.FromString
        )
        return call(request, timeout=self._timeout_seconds)


def _parameters(controls: Controls) -> pb.Parameters:
    return pb.Parameters(
        attenuation_limit_db=controls.attenuation_limit_db, mix=controls.mix, postfilter=controls.postfilter
    )
