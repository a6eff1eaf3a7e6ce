from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnhanceAudioConfig(_message.Message):
    __slots__ = ("intensity_ratio",)
    INTENSITY_RATIO_FIELD_NUMBER: _ClassVar[int]
    intensity_ratio: float
    def __init__(self, intensity_ratio: _Optional[float] = ...) -> None: ...

class EnhanceAudioRequest(_message.Message):
    __slots__ = ("audio_stream_data", "config")
    AUDIO_STREAM_DATA_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    audio_stream_data: bytes
    config: EnhanceAudioConfig
    def __init__(self, audio_stream_data: _Optional[bytes] = ..., config: _Optional[_Union[EnhanceAudioConfig, _Mapping]] = ...) -> None: ...

class EnhanceAudioResponse(_message.Message):
    __slots__ = ("audio_stream_data", "config")
    AUDIO_STREAM_DATA_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    audio_stream_data: bytes
    config: EnhanceAudioConfig
    def __init__(self, audio_stream_data: _Optional[bytes] = ..., config: _Optional[_Union[EnhanceAudioConfig, _Mapping]] = ...) -> None: ...
