"""The settings of event classes, and the map from events to handlers."""

import pickle
from dataclasses import FrozenInstanceError, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import ClassVar
from uuid import RFC_4122, UUID, SafeUUID

import pytest

from diator.events import DomainEvent, ECSTEvent, Event, EventHandler, EventMap, NotificationEvent
from diator.exceptions import BindingError
from tests.unit.doubles import Greeted, MeetingChanged, Noticed, UserJoined

# -- the base classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [NotificationEvent, ECSTEvent])
def test_an_integration_event_has_an_id_and_a_time_in_utc(base):
    before = datetime.now(UTC)

    first, second = base(), base()

    assert isinstance(first.event_id, UUID)
    assert first.event_id != second.event_id
    assert before <= first.event_timestamp <= datetime.now(UTC)
    assert first.event_timestamp.utcoffset() == timedelta(0)


def test_the_id_of_an_event_is_a_random_uuid():
    ids = {NotificationEvent().event_id for _ in range(200)}

    assert len(ids) == 200
    assert {(each.version, each.variant) for each in ids} == {(4, RFC_4122)}
    for each in ids:
        assert each == UUID(str(each)) == pickle.loads(pickle.dumps(each))
        assert hash(each) == hash(UUID(str(each)))
        assert each.is_safe is SafeUUID.unknown
    varying = 0
    for each in ids:
        varying |= each.int ^ min(ids).int
    assert f"{varying:032x}" == "ffffffffffff0fff3fffffffffffffff"


def test_an_integration_event_is_frozen():
    with pytest.raises(FrozenInstanceError):
        UserJoined().user_id = 2


def test_the_message_types_match_the_older_diator():
    assert (NotificationEvent.message_type, ECSTEvent.message_type) == ("notification_event", "ecst_event")


@pytest.mark.parametrize("base", [Event, DomainEvent])
def test_a_domain_event_has_no_fields(base):
    @dataclass
    class Happened(base):
        user_id: int

    assert [field.name for field in fields(Happened)] == ["user_id"]


# -- binding ---------------------------------------------------------------------------------------------------------


async def first(event: Noticed) -> None: ...


async def second(event: Noticed) -> None: ...


class Third(EventHandler[Noticed]):
    async def handle(self, event: Noticed) -> None: ...


def test_returns_all_handlers_in_the_order_of_binding():
    events = EventMap()

    for handler in (second, Third, first):
        events.bind(Noticed, handler)

    assert events.get(Noticed) == (second, Third, first)
    assert [*events] == [Noticed]


def test_the_decorator_reads_the_event_from_the_annotation():
    events = EventMap()

    assert events.handler(first) is first
    assert events.handler(Third) is Third

    assert events.get(Noticed) == (first, Third)


def test_an_event_without_handlers_has_none():
    assert EventMap().get(Noticed) == ()


def test_a_subclass_does_not_inherit_handlers():
    class NoticedLoudly(Noticed): ...

    events = EventMap()
    events.bind(Noticed, first)

    assert events.get(NoticedLoudly) == ()


def test_a_handler_is_bound_once():
    events = EventMap()
    events.bind(Noticed, first)

    with pytest.raises(BindingError, match="first is already bound to Noticed"):
        events.bind(Noticed, first)

    assert events.get(Noticed) == (first,)


class Unfinished(EventHandler[Noticed]): ...


class Synchronous(EventHandler[Noticed]):
    def handle(self, event: Noticed) -> None: ...


class WithOneList(EventHandler[Noticed]):
    events: ClassVar[list[Event]] = []

    async def handle(self, event: Noticed) -> None: ...


@pytest.mark.parametrize(
    ("event_type", "handler", "problem"),
    [
        (Greeted, Third, "Third handles Noticed and cannot be bound to Greeted"),
        (Noticed, Unfinished, "Unfinished is abstract"),
        (Noticed, Synchronous, r"Synchronous\.handle is not asynchronous"),
        (
            Noticed,
            WithOneList,
            (
                r"^WithOneList\.events is one list for all objects of the class, so events would be sent twice; make "
                "it in the constructor$"
            ),
        ),
        (Noticed(), first, "is not a class; bind handlers to the class"),
    ],
)
def test_refuses(event_type, handler, problem):
    events = EventMap()

    with pytest.raises(BindingError, match=problem):
        events.bind(event_type, handler)

    assert [*events] == []


def test_the_decorator_refuses_a_handler_without_an_annotation():
    async def anything(event): ...

    with pytest.raises(BindingError, match="annotate 'event' with one class"):
        EventMap().handler(anything)


# -- wire names ------------------------------------------------------------------------------------------------------


def named(class_name, name=None, base=NotificationEvent):
    return type(class_name, (base,), {} if name is None else {"message_name": name})


async def on_anything(event: object) -> None: ...


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (named("UserJoined"), named("UserJoined")),
        (named("UserJoined"), named("userJOINED")),
        (named("UserJoined"), named("Other", "UserJoined")),
        (named("One", "straße"), named("Other", "STRASSE")),
        (named("UserJoined"), named("UserJoined", base=ECSTEvent)),
    ],
    ids=["two classes", "only case", "given name", "only case, folded", "of two kinds"],
)
def test_two_events_cannot_have_the_same_wire_name(one, other):
    events = EventMap()
    events.bind(one, on_anything)

    with pytest.raises(BindingError, match="have the same wire name"):
        events.bind(other, on_anything)

    assert [*events] == [one]


def test_a_name_is_not_inherited():
    """A reader could not distinguish two classes with the same name."""

    @dataclass(frozen=True, kw_only=True)
    class Joined(NotificationEvent):
        message_name: ClassVar[str] = "user.joined"

    @dataclass(frozen=True, kw_only=True)
    class JoinedLoudly(Joined): ...

    events = EventMap()

    for event_type in (Joined, JoinedLoudly):
        events.bind(event_type, on_anything)

    assert [*events] == [Joined, JoinedLoudly]


def test_domain_events_have_no_wire_names():
    events = EventMap()

    for event_type in (named("Happened", base=DomainEvent), named("Happened", base=DomainEvent)):
        events.bind(event_type, on_anything)

    assert len([*events]) == 2


def test_several_handlers_of_one_event_share_its_name():
    async def another(event: UserJoined) -> None: ...

    events = EventMap()

    events.bind(UserJoined, on_anything)
    events.bind(UserJoined, another)
    events.bind(MeetingChanged, on_anything)

    assert events.get(UserJoined) == (on_anything, another)
