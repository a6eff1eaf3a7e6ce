"""The messages of live streams and clips: what a caller's must be, and what the service's say."""

from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from percepnet.errors import ParameterError
from percepnet.model import Manifest
from percepnet.synthesis import Controls
from service import pcm
from service.engine import Answer, Options, Session
from service.limits import MAX_MESSAGE_SECONDS, MAX_RATE_HZ, MIN_RATE_HZ
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

_ENCODINGS: dict[pb.Encoding, np.dtype] = {pb.ENCODING_S16LE: pcm.S16LE, pb.ENCODING_F32LE: pcm.F32LE}

_Parsed = TypeVar("_Parsed", bound=Message)


def parse(kind: type[_Parsed], data: bytes) -> _Parsed:
    """Read a message; raises ParameterError if the bytes are none of this kind."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ParameterError(f"the message is no {kind.DESCRIPTOR.full_name}") from error


def payload(request: pb.EnhanceStreamRequest | None) -> str:
    """What a message brings, in words."""
    return (request.WhichOneof("payload") if request is not None else None) or "nothing"


def opening(request: pb.EnhanceStreamRequest) -> Options:
    """What the first message of a stream asks for; raises ParameterError."""
    if request.WhichOneof("payload") != "config":
        raise ParameterError(f"payload: the first message is {payload(request)}; it must be config")
    return options(request.config)


def options(config: pb.StreamConfig) -> Options:
    """The checked config of a stream; raises ParameterError with the name of the field."""
    sample_rate = rate(config.sample_rate_hz, "config.sample_rate_hz")
    longest = sample_rate * MAX_MESSAGE_SECONDS
    if config.message_samples > longest:
        raise ParameterError(f"config.message_samples: {config.message_samples}; accepted are 0 to {longest}")
    return Options(
        sample_rate,
        encoding(config.encoding, "config.encoding"),
        controls(config.parameters, "config.parameters"),
        config.message_samples,
        config.compensate_delay,
        config.report,
        never_dry=config.never_dry,
    )


def rate(rate_hz: int, field: str) -> int:
    """A sample rate that is accepted; raises ParameterError."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise ParameterError(f"{field}: {rate_hz}; accepted are {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    return rate_hz


def encoding(number: pb.Encoding, field: str) -> np.dtype:
    """The type of samples on the wire; raises ParameterError."""
    if number not in _ENCODINGS:
        accepted = " and ".join(pb.Encoding.Name(name) for name in _ENCODINGS)
        raise ParameterError(f"{field}: {number}; accepted are {accepted}")
    return _ENCODINGS[number]


def controls(parameters: pb.Parameters, field: str) -> Controls:
    """Parameters with their defaults filled in; raises ParameterError."""
    try:
        return Controls(**{chosen.name: value for chosen, value in parameters.ListFields()})
    except ParameterError as error:
        raise ParameterError(f"{field}.{error}") from error


def parameters(controls: Controls) -> pb.Parameters:
    """All parameters in force, as a message."""
    return pb.Parameters(
        attenuation_limit_db=controls.attenuation_limit_db,
        mix=controls.mix,
        postfilter=controls.postfilter,
    )


def samples(data: bytes, kind: np.dtype, longest: int) -> np.ndarray:
    """The samples of a message, float32 (n,); raises ParameterError for broken ones and for too many."""
    if len(data) % kind.itemsize:
        raise ParameterError(f"audio: {len(data)} bytes; samples have {kind.itemsize} bytes each")
    if len(data) > longest * kind.itemsize:
        raise ParameterError(
            f"audio: {len(data) // kind.itemsize} samples; accepted are {longest} in a message"
        )
    return pcm.decode(data, kind)


def audio(request: pb.EnhanceStreamRequest, options: Options) -> np.ndarray:
    """The samples that a stream's message brings, float32 (n,); raises ParameterError."""
    return samples(request.audio, options.encoding, options.sample_rate * MAX_MESSAGE_SECONDS)


def started(
    session: Session, manifest: Manifest, idle_seconds: float, challenge: bytes
) -> pb.EnhanceStreamResponse:
    """Answers the config."""
    chosen = session.options
    config = pb.StreamConfig(
        sample_rate_hz=chosen.sample_rate,
        encoding=next(name for name, kind in _ENCODINGS.items() if kind == chosen.encoding),
        parameters=parameters(chosen.controls),
        message_samples=chosen.message_samples,
        compensate_delay=chosen.compensate_delay,
        report=chosen.report,
        never_dry=chosen.never_dry,
    )
    return pb.EnhanceStreamResponse(
        started=pb.StreamStarted(
            delay_samples=session.delay_samples,
            model_name=manifest.name,
            model_version=manifest.version,
            config=config,
            idle_timeout_seconds=idle_seconds,
            challenge=challenge,
        )
    )


def handed_over(session: Session, state: bytes) -> pb.EnhanceStreamResponse:
    """Brings the state of a session."""
    return pb.EnhanceStreamResponse(handed_over=pb.HandedOver(state=state, position=session.n_heard))


def resumed(session: Session) -> pb.EnhanceStreamResponse:
    """Answers a state that was taken."""
    return pb.EnhanceStreamResponse(resumed=pb.Resumed(position=session.n_heard))


def response(answer: Answer, session: Session, draining: bool) -> pb.EnhanceStreamResponse:
    """Answers audio, a flush, the end or new parameters."""
    if answer.controls is not None:
        updated = pb.ParametersUpdated(parameters=parameters(answer.controls), position=answer.position)
        return pb.EnhanceStreamResponse(parameters=updated)
    response = pb.EnhanceStreamResponse()
    audio = response.audio  # filled in place: a part given to the constructor is copied
    audio.audio = answer.audio
    audio.position = answer.position
    audio.flushed = answer.flushed
    if answer.report is not None:
        audio.report.speech_probability = answer.report.speech_probability
        audio.report.pitch_hz = answer.report.pitch_hz
        audio.report.mean_gain = answer.report.mean_gain
    if session.answers:
        audio.queued_samples = session.queued_samples
    audio.draining = draining
    audio.dry = answer.dry
    return response
