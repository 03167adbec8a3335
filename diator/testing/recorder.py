"""What a program has sent, to ask in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from diator.brokers.codec import payload_decoder
from diator.brokers.message import Message
from diator.events._event import message_name_of

E = TypeVar("E")


class Recorder:
    """
    A broker that keeps what it is sent, for tests of a mediator; or the books of a `FaultyMessageBroker`.

    Events are read back from their messages, as another program would read them. What does not hold raises an
    `AssertionError` whose text shows the events that there were.

    Attributes:
        messages: What was sent, in its order.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`. It always succeeds."""
        self.messages.append(message)

    @property
    def names(self) -> list[str]:
        """The names of the messages on the wire, in their order: `assert recorder.names == ["UserJoined"]`."""
        return [message.message_name for message in self.messages]

    def events(self, event_type: type[E], /, **fields: object) -> list[E]:
        """Give the events of *event_type* that have these *fields*, in their order."""
        return [event for event in self._all(event_type) if _has(event, fields)]

    def one(self, event_type: type[E], /, **fields: object) -> E:
        """Give the one event of *event_type* that has these *fields*. AssertionError if there is none, or another."""
        found = self.events(event_type, **fields)
        if len(found) != 1:
            raise AssertionError(
                f"expected one {_told(event_type, fields)}, and there are {len(found)}; {self._were(event_type)}"
            )
        return found[0]

    def none(self, event_type: type[object], /, **fields: object) -> None:
        """AssertionError if there is an event of *event_type* that has these *fields*."""
        if found := self.events(event_type, **fields):
            raise AssertionError(
                f"expected no {_told(event_type, fields)}, and there are {len(found)}; {self._were(event_type)}"
            )

    def clear(self) -> None:
        """Forget everything so far."""
        self.messages.clear()

    def __len__(self) -> int:
        return len(self.messages)

    def _all(self, event_type: type[E]) -> list[E]:
        read, topic = payload_decoder(event_type), (getattr(event_type, "message_type", None), name_on_wire(event_type))
        return [read(each.payload_json) for each in self.messages if (each.message_type, each.message_name) == topic]

    def _were(self, event_type: type[object]) -> str:
        of_type = self._all(event_type)
        shown: Sequence[object] = of_type or self.names
        return f"sent were {', '.join(map(str, shown)) or 'none at all'}"


def name_on_wire(event_type: type[object]) -> str:
    """
    Give the name of an event's messages.

    Raises:
        TypeError: It is no event that travels.
    """
    if not getattr(event_type, "message_type", None):
        raise TypeError(f"{event_type.__qualname__} is no event that travels: nothing of it is ever sent")
    return message_name_of(event_type)


def _has(event: object, fields: dict[str, Any]) -> bool:
    return all(getattr(event, name) == value for name, value in fields.items())


def _told(event_type: type[object], fields: dict[str, Any]) -> str:
    return " with ".join([event_type.__name__, *[", ".join(f"{k}={v!r}" for k, v in fields.items())] * bool(fields)])
