"""A base class for a broker that wraps another one, such as to trace sends or to add headers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

from diator._hints import described
from diator.brokers.audit import Finding, audit
from diator.brokers.base import Delivery, OnGap, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.brokers.sending import Due, send_one_by_one, transactional
from diator.exceptions import ConfigurationError


class Wrapped:
    """
    A broker that passes every call on to *broker*, and has its abilities. A subclass overrides what it changes.

    Override `outgoing` to change messages, as in:

        class Correlated(Wrapped):
            def outgoing(self, message: Message) -> Message:
                return replace(message, headers={**message.headers, "correlation-id": current.get()})

    Override `send_message` to act before and after a send. `send_messages` then sends one message after the other with
    it, unless the subclass overrides that too. Neither is called if *broker* is an outbox, whose
    relay sends.

    *broker* may be a whole transport, or have only `send_message`: what it lacks, this broker lacks as well. All other
    public attributes, such as `check_message` and `publish`, are those of *broker*.

    Args:
        broker: The broker that sends and receives. It is closed together with this one.

    Raises:
        ConfigurationError: *broker* cannot send.
    """

    def __init__(self, broker: Any) -> None:
        if isinstance(broker, type) or not callable(getattr(broker, "send_message", None)):
            raise ConfigurationError(f"broker must be an object with `send_message`, and it is {described(broker)}")
        self._wrapped = broker

    def outgoing(self, message: Message) -> Message:
        """Return the message that is sent instead of *message*. Default: *message* itself."""
        return message

    async def send_message(self, message: Message, /) -> None:
        """Send the message that `outgoing` returns; see `MessageBroker.send_message`."""
        await self._wrapped.send_message(self.outgoing(message))

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        """Send *messages* in their order; see `BatchMessageBroker.send_messages`."""
        is_whole = type(self).send_message is Wrapped.send_message and hasattr(self._wrapped, "send_messages")
        if is_whole:
            await self._wrapped.send_messages([self.outgoing(message) for message in messages])
        else:
            await send_one_by_one(self.send_message, messages)

    async def store(
        self, messages: Sequence[Message], due: Sequence[Due], session: Any, /
    ) -> Callable[[], bool] | None:
        """Store the messages that `outgoing` returns, in a broker that stores; see `TransactionalBroker.store`."""
        was_rolled_back: Callable[[], bool] | None = await self._wrapped.store(
            [self.outgoing(message) for message in messages], due, session
        )
        return was_rolled_back

    @property
    def transactional(self) -> bool:
        """Whether this broker takes part in the unit of work, see `diator.brokers.sending.transactional`."""
        return transactional(self._wrapped)

    @property
    def capabilities(self) -> Capabilities:
        """The promises of the wrapped transport."""
        promised: Capabilities = self._wrapped.capabilities
        return promised

    def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Subscribe to *topics*; see `ReadableBroker.subscribe`."""
        subscription: AbstractAsyncContextManager[AsyncIterator[Delivery]] = self._wrapped.subscribe(
            topics, group=group, prefetch=prefetch, on_gap=on_gap
        )
        return subscription

    async def audit(self) -> Sequence[Finding]:
        """Return the findings of the wrapped broker; see `Auditable.audit`."""
        return await audit(self._wrapped)

    async def aclose(self) -> None:
        """Close the wrapped broker, if it can be closed."""
        if hasattr(self._wrapped, "aclose"):
            await self._wrapped.aclose()

    async def __aenter__(self) -> Self:
        if hasattr(self._wrapped, "__aenter__"):
            await self._wrapped.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy of this object looks for some before it has a broker
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self._wrapped, name)
