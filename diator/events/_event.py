from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from typing import ClassVar
from uuid import UUID, SafeUUID

from diator._hints import fields_of, name_of, undeclared_in
from diator.exceptions import NotAnEvent


class Event:
    """
    The base class of all events. An event that derives from this class alone is a domain event.

    It has no fields, so a dataclass, an attrs class, or a pydantic or msgspec model may derive from it.
    """

    __slots__ = ()


class DomainEvent(Event):
    """An event that the same process handles, inside the unit of work of the request whose handler raised it."""

    __slots__ = ()


def _random_id() -> UUID:
    """Return a random UUID as `uuid.uuid4` does, in half of the time: `uuid4` validates its own arguments."""
    made = UUID.__new__(UUID)
    # RFC 9562, 5.4: all bits are random except the version, 4, and the variant, 0b10.
    number = int.from_bytes(os.urandom(16)) & ~(0xF000 << 64 | 0xC000 << 48) | (0x4000 << 64 | 0x8000 << 48)
    object.__setattr__(made, "int", number)
    object.__setattr__(made, "is_safe", SafeUUID.unknown)
    return made


def _now() -> datetime:
    return datetime.now(UTC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotificationEvent(Event):
    """
    An integration event that reports what happened and contains identifiers only. It is sent through the broker.

    Derive dataclasses from it. Derive other classes from `Event`, and declare `message_type`, `event_id` and
    `event_timestamp` in them.

    Attributes:
        event_id: The id of the event and of its message. Every duplicate of the message has the same id.
        event_timestamp: When the event was made, with a time zone (UTC). None in an event that another program sent
            without it.
        message_type: The kind of message, a class variable.
        message_name: The wire name, an optional class variable (`ClassVar[str]`). Default: the name of the class.
        message_key: The name of a field, an optional class variable (`ClassVar[str]`). Messages with the same value in
            this field keep their order, on transports that order by key. The key of a message is the value as the
            payload has it, without quotes.
        message_headers: Headers with the names of their fields, an optional class variable
            (`ClassVar[Mapping[str, str]]`). A field that is None makes no header.
    """

    message_type: ClassVar[str] = "notification_event"

    event_id: UUID = dataclasses.field(default_factory=_random_id)
    event_timestamp: datetime | None = dataclasses.field(default_factory=_now)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECSTEvent(Event):
    """
    An integration event that contains the new state (event-carried state transfer). It is sent through the broker.

    Its attributes are those of `NotificationEvent`.
    """

    message_type: ClassVar[str] = "ecst_event"

    event_id: UUID = dataclasses.field(default_factory=_random_id)
    event_timestamp: datetime | None = dataclasses.field(default_factory=_now)


# -- the settings of an event class --------------------------------------------------------------------------------


def is_integration_event(event_type: type) -> bool:
    """
    Return whether events of this type go to the message broker: whether the class has a `message_type`.

    Raises:
        NotAnEvent: A field of that name hides the class variable of a base class.
    """
    if _setting(event_type, "message_type") is not None:
        return True
    if any(_setting(base, "message_type") for base in event_type.__mro__[1:]):
        raise NotAnEvent(f"the field message_type of {name_of(event_type)} hides the class variable; rename the field")
    return False


def message_name_of(event_type: type) -> str:
    """Return the wire name. A subclass does not inherit it: a reader could not distinguish the two classes."""
    return _setting(event_type, "message_name", inherited=False) or event_type.__name__


def message_key_of(event_type: type) -> str | None:
    """Return the name of the field whose value orders the messages. NotAnEvent if the class has no such field."""
    key = _setting(event_type, "message_key")
    if key is not None and key not in fields_of(event_type):
        raise NotAnEvent(f"{name_of(event_type)}.message_key is {key!r}, which is not a field of the class")
    return key


def check_integration_event(event_type: type) -> None:
    """
    Check that the message of an event would contain all of the event.

    Raises:
        NotAnEvent: The class has no field `event_id` or `event_timestamp`, or has annotations that are not fields.
    """
    fields = fields_of(event_type)
    missing = [name for name in ("event_id", "event_timestamp") if name not in fields]
    if missing:
        raise NotAnEvent(
            f"the integration event {name_of(event_type)} needs the field {' and the field '.join(missing)}"
        )
    if problem := undeclared_in(event_type):
        raise NotAnEvent(problem)


def _setting(event_type: type, name: str, *, inherited: bool = True) -> str | None:
    value = getattr(event_type, name, None) if inherited else event_type.__dict__.get(name)
    return value if isinstance(value, str) and name not in fields_of(event_type) else None
