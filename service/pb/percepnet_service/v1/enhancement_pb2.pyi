from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_S16LE: _ClassVar[Encoding]
    ENCODING_F32LE: _ClassVar[Encoding]
ENCODING_UNSPECIFIED: Encoding
ENCODING_S16LE: Encoding
ENCODING_F32LE: Encoding

class Parameters(_message.Message):
    __slots__ = ("attenuation_limit_db", "mix", "postfilter")
    ATTENUATION_LIMIT_DB_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    POSTFILTER_FIELD_NUMBER: _ClassVar[int]
    attenuation_limit_db: float
    mix: float
    postfilter: float
    def __init__(self, attenuation_limit_db: _Optional[float] = ..., mix: _Optional[float] = ..., postfilter: _Optional[float] = ...) -> None: ...

class StreamConfig(_message.Message):
    __slots__ = ("sample_rate_hz", "encoding", "parameters", "message_samples", "compensate_delay", "report", "never_dry")
    SAMPLE_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    COMPENSATE_DELAY_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    NEVER_DRY_FIELD_NUMBER: _ClassVar[int]
    sample_rate_hz: int
    encoding: Encoding
    parameters: Parameters
    message_samples: int
    compensate_delay: bool
    report: bool
    never_dry: bool
    def __init__(self, sample_rate_hz: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., parameters: _Optional[_Union[Parameters, _Mapping]] = ..., message_samples: _Optional[int] = ..., compensate_delay: bool = ..., report: bool = ..., never_dry: bool = ...) -> None: ...

class EnhanceStreamRequest(_message.Message):
    __slots__ = ("config", "audio", "parameters", "flush", "end", "hand_over", "resume")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    config: StreamConfig
    audio: bytes
    parameters: Parameters
    flush: Flush
    end: End
    hand_over: HandOver
    resume: Resume
    def __init__(self, config: _Optional[_Union[StreamConfig, _Mapping]] = ..., audio: _Optional[bytes] = ..., parameters: _Optional[_Union[Parameters, _Mapping]] = ..., flush: _Optional[_Union[Flush, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class Flush(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class End(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandOver(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    def __init__(self, state: _Optional[bytes] = ...) -> None: ...

class EnhanceStreamResponse(_message.Message):
    __slots__ = ("started", "audio", "parameters", "handed_over", "resumed")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    started: StreamStarted
    audio: EnhancedAudio
    parameters: ParametersUpdated
    handed_over: HandedOver
    resumed: Resumed
    def __init__(self, started: _Optional[_Union[StreamStarted, _Mapping]] = ..., audio: _Optional[_Union[EnhancedAudio, _Mapping]] = ..., parameters: _Optional[_Union[ParametersUpdated, _Mapping]] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ...) -> None: ...

class StreamStarted(_message.Message):
    __slots__ = ("delay_samples", "model_name", "model_version", "config", "idle_timeout_seconds", "challenge")
    DELAY_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    delay_samples: int
    model_name: str
    model_version: str
    config: StreamConfig
    idle_timeout_seconds: float
    challenge: bytes
    def __init__(self, delay_samples: _Optional[int] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., config: _Optional[_Union[StreamConfig, _Mapping]] = ..., idle_timeout_seconds: _Optional[float] = ..., challenge: _Optional[bytes] = ...) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("state", "position")
    STATE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    position: int
    def __init__(self, state: _Optional[bytes] = ..., position: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class EnhancedAudio(_message.Message):
    __slots__ = ("audio", "position", "report", "flushed", "queued_samples", "draining", "dry")
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DRY_FIELD_NUMBER: _ClassVar[int]
    audio: bytes
    position: int
    report: Report
    flushed: bool
    queued_samples: int
    draining: bool
    dry: bool
    def __init__(self, audio: _Optional[bytes] = ..., position: _Optional[int] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., flushed: bool = ..., queued_samples: _Optional[int] = ..., draining: bool = ..., dry: bool = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("speech_probability", "pitch_hz", "mean_gain")
    SPEECH_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PITCH_HZ_FIELD_NUMBER: _ClassVar[int]
    MEAN_GAIN_FIELD_NUMBER: _ClassVar[int]
    speech_probability: float
    pitch_hz: float
    mean_gain: float
    def __init__(self, speech_probability: _Optional[float] = ..., pitch_hz: _Optional[float] = ..., mean_gain: _Optional[float] = ...) -> None: ...

class ParametersUpdated(_message.Message):
    __slots__ = ("parameters", "position")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    parameters: Parameters
    position: int
    def __init__(self, parameters: _Optional[_Union[Parameters, _Mapping]] = ..., position: _Optional[int] = ...) -> None: ...

class EnhanceStreamsRequest(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionRequest]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionRequest, _Mapping]]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("session_id", "request")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    request: EnhanceStreamRequest
    def __init__(self, session_id: _Optional[int] = ..., request: _Optional[_Union[EnhanceStreamRequest, _Mapping]] = ...) -> None: ...

class EnhanceStreamsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionResponse]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionResponse, _Mapping]]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("session_id", "response", "ended")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    response: EnhanceStreamResponse
    ended: SessionEnded
    def __init__(self, session_id: _Optional[int] = ..., response: _Optional[_Union[EnhanceStreamResponse, _Mapping]] = ..., ended: _Optional[_Union[SessionEnded, _Mapping]] = ...) -> None: ...

class SessionEnded(_message.Message):
    __slots__ = ("code", "message", "retry_seconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_seconds: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_seconds: _Optional[float] = ...) -> None: ...

class EnhanceClipRequest(_message.Message):
    __slots__ = ("sample_rate_hz", "encoding", "parameters", "audio")
    SAMPLE_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    sample_rate_hz: int
    encoding: Encoding
    parameters: Parameters
    audio: bytes
    def __init__(self, sample_rate_hz: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., parameters: _Optional[_Union[Parameters, _Mapping]] = ..., audio: _Optional[bytes] = ...) -> None: ...

class EnhanceClipResponse(_message.Message):
    __slots__ = ("audio", "model_name", "model_version")
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    audio: bytes
    model_name: str
    model_version: str
    def __init__(self, audio: _Optional[bytes] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("model_name", "model_version", "precision", "active_streams", "stream_capacity", "accepting")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_STREAMS_FIELD_NUMBER: _ClassVar[int]
    STREAM_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ACCEPTING_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    precision: str
    active_streams: int
    stream_capacity: int
    accepting: bool
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., precision: _Optional[str] = ..., active_streams: _Optional[int] = ..., stream_capacity: _Optional[int] = ..., accepting: bool = ...) -> None: ...
