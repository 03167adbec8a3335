from __future__ import annotations

import dataclasses
import inspect
import os
from datetime import UTC, datetime
from typing import ClassVar
from uuid import UUID, SafeUUID

from diator._hints import fields_of, name_of
from diator.exceptions import NotAnEvent


class Event:
    """
    Something that happened. An event that derives from this alone is a domain event.

    It holds nothing, so a dataclass, an attrs class or a model of pydantic or msgspec may derive from it.
    """

    __slots__ = ()


class DomainEvent(Event):
    """An event that is handled in this process, inside the unit of work of the request that raised it."""

    __slots__ = ()


def _random_id() -> UUID:
    """Make what `uuid.uuid4` makes. That spends half of its time on looking at what it has just made itself."""
    made = UUID.__new__(UUID)
    # RFC 9562, 5.4: all is random but the version, 4, and the variant, 0b10.
    number = int.from_bytes(os.urandom(16)) & ~(0xF000 << 64 | 0xC000 << 48) | (0x4000 << 64 | 0x8000 << 48)
    object.__setattr__(made, "int", number)
    object.__setattr__(made, "is_safe", SafeUUID.unknown)
    return made


def _now() -> datetime:
    return datetime.now(UTC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotificationEvent(Event):
    """
    An event that travels through the message broker and says what happened, by identifiers.

    A dataclass derives from it; other classes derive from `Event` and declare `message_type`, `event_id` and
    `event_timestamp` themselves. A class may also say `message_name: ClassVar[str]`, its name on the wire (default:
    the name of the class), and `message_key: ClassVar[str]`, the field whose value orders its messages.
    """

    message_type: ClassVar[str] = "notification_event"

    event_id: UUID = dataclasses.field(default_factory=_random_id)
    """Also the id of the message, so that each repeat of it is recognisable."""
    event_timestamp: datetime = dataclasses.field(default_factory=_now)
    """Aware, in UTC."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECSTEvent(Event):
    """
    An event that travels through the message broker and carries the new state (event-carried state transfer).

    In all else it is like `NotificationEvent`.
    """

    message_type: ClassVar[str] = "ecst_event"

    event_id: UUID = dataclasses.field(default_factory=_random_id)
    event_timestamp: datetime = dataclasses.field(default_factory=_now)


# -- what a class says of its messages ---------------------------------------------------------------------------


def travels(event_type: type) -> bool:
    """
    Whether events of this type go to the message broker: whether the class says a `message_type`.

    Raises:
        NotAnEvent: A field of that name hides what a base says.
    """
    if _setting(event_type, "message_type") is not None:
        return True
    if any(_setting(base, "message_type") for base in event_type.__mro__[1:]):
        raise NotAnEvent(f"{name_of(event_type)} travels, and hides it with a field message_type; name that otherwise")
    return False


def message_name_of(event_type: type) -> str:
    """Give the name on the wire. It is not inherited: two classes of one name could not be told apart."""
    return _setting(event_type, "message_name", inherited=False) or event_type.__name__


def message_key_of(event_type: type) -> str | None:
    """Give the field whose value orders the messages. NotAnEvent if there is no such field."""
    key = _setting(event_type, "message_key")
    if key is not None and key not in fields_of(event_type):
        raise NotAnEvent(f"{name_of(event_type)}.message_key is {key!r}, and there is no such field")
    return key


def check_travels_whole(event_type: type) -> None:
    """
    Refuse a class of which a part would be lost on the way.

    Raises:
        NotAnEvent: It lacks `event_id` or `event_timestamp`, or has annotated fields that are none.
    """
    fields = fields_of(event_type)
    missing = [name for name in ("event_id", "event_timestamp") if name not in fields]
    if missing:
        raise NotAnEvent(f"{name_of(event_type)} travels and has no field {' and no field '.join(missing)}")
    if dataclasses.is_dataclass(event_type) and "__attrs_attrs__" in event_type.__dict__:
        raise NotAnEvent(
            f"{name_of(event_type)} is an attrs class that derives from a dataclass, and its fields would be lost; "
            "derive it from Event and declare message_type, event_id and event_timestamp"
        )
    if dataclasses.is_dataclass(event_type) and "__dataclass_fields__" not in event_type.__dict__:
        own = [name for name in inspect.get_annotations(event_type) if name not in fields]
        if own:
            raise NotAnEvent(f"{name_of(event_type)} declares {', '.join(own)} and is no dataclass; decorate it as one")


def _setting(event_type: type, name: str, *, inherited: bool = True) -> str | None:
    value = getattr(event_type, name, None) if inherited else event_type.__dict__.get(name)
    return value if isinstance(value, str) and name not in fields_of(event_type) else None
