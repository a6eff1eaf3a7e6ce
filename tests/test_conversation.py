"""The part of the client that knows no network, with servers that only delay.

Invariant: however items, answers and losses of the server follow each other, each passage comes out whole:
every sample once, in its place.
"""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet.errors import ParameterError
from percepnet.synthesis import Controls
from service.client.conversation import Conversation, Item, Mark
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

RATE = 8_000
DELAY = 300


class DelayingServer:
    """Answers as a server does whose signal path is a delay."""

    def __init__(self, requests: list[pb.EnhanceStreamRequest]) -> None:
        self.answers: deque[pb.EnhanceStreamResponse] = deque()
        self.config = requests[0].config
        self._begin()
        for request in requests[1:]:
            self.hear(request)

    def _begin(self) -> None:
        self._waiting = np.zeros(DELAY, "<f4")
        self._position = -DELAY

    def hear(self, request: pb.EnhanceStreamRequest) -> None:
        if request.HasField("parameters"):
            updated = pb.ParametersUpdated(parameters=request.parameters, position=self._position + DELAY)
            self.answers.append(pb.EnhanceStreamResponse(parameters=updated))
            return
        ending = not request.HasField("audio")
        heard = np.zeros(DELAY, "<f4") if ending else np.frombuffer(request.audio, "<f4")
        line = np.concatenate([self._waiting, heard])
        audio = pb.EnhancedAudio(audio=line[: len(heard)].tobytes(), position=self._position, flushed=ending)
        self.answers.append(pb.EnhanceStreamResponse(audio=audio))
        self._waiting = line[len(heard) :]
        self._position += len(heard)
        if ending:
            self._begin()


class Talk:
    """A conversation with servers that are lost now and then."""

    def __init__(self, *, compensate_delay: bool) -> None:
        self.talk = Conversation(RATE, compensate_delay=compensate_delay)
        self.passages: list[list[np.ndarray]] = [[]]
        self.updates: list[int] = []
        self.find_server()

    def find_server(self) -> None:
        opening = self.talk.opening()
        self.server = DelayingServer(opening.messages)
        started = pb.StreamStarted(delay_samples=DELAY)
        self.talk.opened(opening, pb.EnhanceStreamResponse(started=started))

    def send(self, item: Item) -> None:
        self.server.hear(self.talk.ask(item))

    def receive(self) -> None:
        if not self.server.answers:
            return
        answer = self.talk.take(self.server.answers.popleft())
        if answer is None:
            return
        if answer.message.HasField("parameters"):
            self.updates.append(answer.position)
            return
        passage = self.passages[-1]
        lead_in = 0 if self.talk._compensate else DELAY
        if len(answer.samples):
            assert answer.position == sum(map(len, passage)) - lead_in
        passage.append(answer.samples)
        if answer.message.audio.flushed:
            self.passages.append([])


steps = st.lists(
    st.one_of(st.integers(0, RATE), st.sampled_from(["receive", "receive", "lose", "flush", "update"])),
    max_size=40,
)


@settings(deadline=None)
@given(steps=steps, compensate_delay=st.booleans())
def test_every_passage_comes_out_whole(steps: list[int | str], compensate_delay: bool) -> None:
    rng = np.random.default_rng(0)
    talk = Talk(compensate_delay=compensate_delay)
    sent: list[list[np.ndarray]] = [[]]
    updates = []
    for step in steps:
        if step == "receive":
            talk.receive()
        elif step == "lose":
            talk.find_server()
        elif step == "flush":
            talk.send(Mark.FLUSH)
            sent.append([])
        elif step == "update":
            talk.send(Controls(mix=0.5))
            updates.append(sum(map(len, sent[-1])))
        else:
            samples = rng.standard_normal(int(step)).astype(np.float32)
            talk.send(samples)
            sent[-1].append(samples.copy())
            samples[:] = 0  # the caller may use its buffer again
    talk.send(Mark.END)
    while not talk.talk.ended:
        talk.receive()
    assert talk.talk.unanswered_samples == 0
    assert talk.updates == updates
    lead_in = np.zeros(0 if compensate_delay else DELAY, np.float32)
    for heard, spoken in zip(talk.passages[:-1], sent, strict=True):
        np.testing.assert_array_equal(np.concatenate(heard), np.concatenate([lead_in, *spoken]))


def test_a_server_is_told_the_parameters_in_force() -> None:
    talk = Talk(compensate_delay=False)
    talk.send(Controls(mix=0.25))
    talk.find_server()
    assert talk.server.config.parameters.mix == 1  # the update is still to be answered, and is sent again
    talk.receive()
    talk.find_server()
    assert talk.server.config.parameters.mix == 0.25


def test_a_server_with_another_delay_cannot_go_on() -> None:
    talk = Talk(compensate_delay=False)
    started = pb.StreamStarted(delay_samples=DELAY + 1)
    with pytest.raises(ParameterError, match="a delay of 301 samples; the stream began with 300"):
        talk.talk.opened(talk.talk.opening(), pb.EnhanceStreamResponse(started=started))


def test_what_is_kept_is_bounded() -> None:
    talk = Talk(compensate_delay=False)
    for _ in range(100):
        talk.send(np.ones(800, np.float32))
        talk.receive()
    messages = talk.talk.opening().messages[1:]
    assert sum(len(message.audio) // 4 for message in messages) < RATE
