"""A recorder of what a program sends, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from diator.brokers.codec import payload_decoder
from diator.brokers.message import Message
from diator.events._event import message_name_of

E = TypeVar("E")
#: The headers that a message must have; None: any.
Headers: TypeAlias = Mapping[str, str] | None


class Recorder:
    """
    A broker that records the messages of a program, for tests. `FaultyMessageBroker.sent` is such a recorder, too.

    The methods decode events from the recorded messages, as another program would. *headers* are headers that the
    message has, perhaps among others. `one` and `none` raise an `AssertionError` that shows the recorded events.

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

    def events(self, event_type: type[E], /, *, headers: Headers = None, **fields: object) -> list[E]:
        """Return the sent events of *event_type* that have these *headers* and *fields*, in order."""
        wanted = dict(headers or {}).items()
        sent = zip(self._all(event_type), self._messages(event_type), strict=True)
        return [event for event, message in sent if wanted <= message.headers.items() and _has(event, fields)]

    def one(self, event_type: type[E], /, *, headers: Headers = None, **fields: object) -> E:
        """Return the only sent event of *event_type* with these *headers* and *fields*. Raise AssertionError if not."""
        found = self.events(event_type, headers=headers, **fields)
        if len(found) != 1:
            text = _text(event_type, fields, headers)
            raise AssertionError(f"expected one {text}, got {len(found)}; {self._sent(event_type, headers)}")
        return found[0]

    def none(self, event_type: type[object], /, *, headers: Headers = None, **fields: object) -> None:
        """Raise AssertionError if an event of *event_type* with these *headers* and *fields* was sent."""
        if found := self.events(event_type, headers=headers, **fields):
            text = _text(event_type, fields, headers)
            raise AssertionError(f"expected no {text}, got {len(found)}; {self._sent(event_type, headers)}")

    def clear(self) -> None:
        """Remove all recorded messages."""
        self.messages.clear()

    def __len__(self) -> int:
        return len(self.messages)

    def _messages(self, event_type: type[object]) -> list[Message]:
        topic = (getattr(event_type, "message_type", None), name_on_wire(event_type))
        return [each for each in self.messages if (each.message_type, each.message_name) == topic]

    def _all(self, event_type: type[E]) -> list[E]:
        messages, read = self._messages(event_type), payload_decoder(event_type)
        return [read(each.payload_json) for each in messages]

    def _sent(self, event_type: type[object], headers: Headers) -> str:
        shown: Sequence[object] = self._all(event_type) or self.names
        if headers:
            of_type = [{**each.headers} for each in self._messages(event_type)]
            shown = [f"{event} with the headers {own}" for event, own in zip(shown, of_type, strict=False)] or shown
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


def _text(event_type: type[object], fields: dict[str, Any], headers: Headers) -> str:
    wanted = [f"{name}={value!r}" for name, value in fields.items()]
    wanted += [f"headers={dict(headers)!r}"] if headers else []
    return " with ".join([event_type.__name__, *[", ".join(wanted)] * bool(wanted)])
