"""Tests of the recorder of sent events."""

import pytest

from diator.events import DomainEvent, EventEmitter
from diator.testing import Recorder
from tests.unit.doubles import MeetingChanged, Moved, UserJoined


@pytest.fixture
async def recorder():
    recorder = Recorder()
    emitter = EventEmitter(message_broker=recorder)
    for event in (UserJoined(user_id=7), UserJoined(user_id=8), Moved(room="B", number=1)):
        await emitter.emit(event)
    return recorder


async def test_an_event_is_decoded_unchanged():
    recorder, event = Recorder(), UserJoined(user_id=7)

    await EventEmitter(message_broker=recorder).emit(event)

    assert recorder.one(UserJoined) == event
    assert recorder.messages[0].message_id == event.event_id


async def test_events_are_selected_by_type_and_fields(recorder):
    assert recorder.names == ["UserJoined", "UserJoined", "Moved"]
    assert [event.user_id for event in recorder.events(UserJoined)] == [7, 8]
    assert recorder.one(UserJoined, user_id=8).user_id == 8
    assert recorder.one(Moved, room="B", number=1).number == 1
    assert recorder.events(Moved, room="A") == []
    recorder.none(UserJoined, user_id=9)
    recorder.none(MeetingChanged)


@pytest.mark.parametrize(
    ("event_type", "fields", "text"),
    [
        (UserJoined, {}, "expected one UserJoined, got 2; sent: UserJoined("),
        (UserJoined, {"user_id": 9}, "expected one UserJoined with user_id=9, got 0; sent: UserJoined("),
        (MeetingChanged, {}, "expected one MeetingChanged, got 0; sent: UserJoined, UserJoined, Moved"),
    ],
)
async def test_one_fails_unless_there_is_exactly_one_event(recorder, event_type, fields, text):
    with pytest.raises(AssertionError) as caught:
        recorder.one(event_type, **fields)

    assert str(caught.value).startswith(text)


async def test_none_fails_if_there_is_an_event(recorder):
    with pytest.raises(AssertionError, match="expected no UserJoined with user_id=7, got 1; sent: UserJ"):
        recorder.none(UserJoined, user_id=7)


async def test_clear_removes_every_message(recorder):
    recorder.clear()

    with pytest.raises(AssertionError, match="sent: nothing"):
        recorder.one(UserJoined)
    assert len(recorder) == 0


def test_a_domain_event_is_refused():
    with pytest.raises(TypeError, match="DomainEvent is not an integration event"):
        Recorder().none(DomainEvent)


async def test_an_unknown_field_is_an_error(recorder):
    with pytest.raises(AttributeError, match="user"):
        recorder.one(UserJoined, user=7)
