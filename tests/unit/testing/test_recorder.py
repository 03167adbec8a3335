"""What a program has sent, asked for in a test."""

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


async def test_an_event_comes_back_as_it_was():
    recorder, event = Recorder(), UserJoined(user_id=7)

    await EventEmitter(message_broker=recorder).emit(event)

    assert recorder.one(UserJoined) == event
    assert recorder.messages[0].message_id == event.event_id


async def test_events_are_told_apart_by_type_and_fields(recorder):
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
        (UserJoined, {}, "expected one UserJoined, and there are 2; sent were UserJoined("),
        (UserJoined, {"user_id": 9}, "expected one UserJoined with user_id=9, and there are 0; sent were UserJoined("),
        (MeetingChanged, {}, "expected one MeetingChanged, and there are 0; sent were UserJoined, UserJoined, Moved"),
    ],
)
async def test_one_that_is_not_there_once_is_told_with_what_is(recorder, event_type, fields, text):
    with pytest.raises(AssertionError) as caught:
        recorder.one(event_type, **fields)

    assert str(caught.value).startswith(text)


async def test_one_that_should_not_be_there_is_told(recorder):
    with pytest.raises(AssertionError, match="expected no UserJoined with user_id=7, and there are 1; sent were UserJ"):
        recorder.none(UserJoined, user_id=7)


async def test_what_was_cleared_is_forgotten(recorder):
    recorder.clear()

    with pytest.raises(AssertionError, match="sent were none at all"):
        recorder.one(UserJoined)
    assert len(recorder) == 0


def test_an_event_that_never_travels_is_asked_for_in_vain():
    with pytest.raises(TypeError, match="DomainEvent is no event that travels"):
        Recorder().none(DomainEvent)


async def test_a_field_that_an_event_does_not_have_is_an_error_of_the_test(recorder):
    with pytest.raises(AttributeError, match="user"):
        recorder.one(UserJoined, user=7)
