"""A recorder of what a program sends, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from diator.brokers.codec import payload_decoder
from diator.brokers.message import Message
from diator.events._event import message_name_of

E = TypeVar("E")


class Recorder:
    """
    A broker that records the messages of a program, for tests. `FaultyMessageBroker.sent` is such a recorder, too.

    The methods decode events from the recorded messages, as another program would. `one` and `none` raise an
    `AssertionError` that shows the recorded events.

    Attributes:
        messages: The sent messages, in order.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send_message(self, message: Message, /) -> None:
        """Record *message*; see `MessageBroker.send_message`. It always succeeds."""
        self.messages.append(message)

    @property
    def names(self) -> list[str]:
        """The message names, in the order of sending: `assert recorder.names == ["UserJoined"]`."""
        return [message.message_name for message in self.messages]

    def events(self, event_type: type[E], /, **fields: object) -> list[E]:
        """Return the sent events of *event_type* that have these *fields*, in order."""
        return [event for event in self._all(event_type) if _has(event, fields)]

    def one(self, event_type: type[E], /, **fields: object) -> E:
        """Return the sent event of *event_type* with these *fields*. Raise AssertionError unless there is just one."""
        found = self.events(event_type, **fields)
        if len(found) != 1:
            raise AssertionError(
                f"expected one {_text(event_type, fields)}, got {len(found)}; {self._sent(event_type)}"
            )
        return found[0]

    def none(self, event_type: type[object], /, **fields: object) -> None:
        """Raise AssertionError if an event of *event_type* with these *fields* was sent."""
        if found := self.events(event_type, **fields):
            raise AssertionError(f"expected no {_text(event_type, fields)}, got {len(found)}; {self._sent(event_type)}")

    def clear(self) -> None:
        """Remove all recorded messages."""
        self.messages.clear()

    def __len__(self) -> int:
        return len(self.messages)

    def _all(self, event_type: type[E]) -> list[E]:
        topic, read = (getattr(event_type, "message_type", None), name_on_wire(event_type)), payload_decoder(event_type)
        return [read(each.payload_json) for each in self.messages if (each.message_type, each.message_name) == topic]

    def _sent(self, event_type: type[object]) -> str:
        of_type = self._all(event_type)
        shown: Sequence[object] = of_type or self.names
        return f"sent: {', '.join(map(str, shown)) or 'nothing'}"


def name_on_wire(event_type: type[object]) -> str:
    """
    Return the message name of *event_type*.

    Raises:
        TypeError: *event_type* is not an integration event.
    """
    if not getattr(event_type, "message_type", None):
        raise TypeError(
            f"{event_type.__qualname__} is not an integration event, so it is never sent; "
            "pass a NotificationEvent or an ECSTEvent"
        )
    return message_name_of(event_type)


def _has(event: object, fields: dict[str, Any]) -> bool:
    return all(getattr(event, name) == value for name, value in fields.items())


def _text(event_type: type[object], fields: dict[str, Any]) -> str:
    return " with ".join([event_type.__name__, *[", ".join(f"{k}={v!r}" for k, v in fields.items())] * bool(fields)])
