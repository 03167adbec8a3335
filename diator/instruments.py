"""The hook for telemetry: what a program may measure or trace while diator handles requests and messages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

from diator._hints import described, name_of
from diator.brokers.message import Message, Topic, check_headers
from diator.context import MessageContext, log_fields
from diator.exceptions import ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

Outcome: TypeAlias = Literal["acked", "duplicate", "retried", "dead_lettered", "given_up", "unsettled"]


@dataclass(frozen=True, kw_only=True)
class Handled:
    """
    The outcome of one delivery. It contains nothing of the message except its id, so it may be logged.

    Attributes:
        topic: The topic that the delivery came from.
        group: The consumer group; None without one.
        message_id: The id of the message; None if the body could not be decoded.
        attempt: 1 for the first delivery to this consumer group, 2 for the second; always 1 on a transport that does
            not count deliveries.
        outcome: `acked`: every handler succeeded. `duplicate`: the message was acknowledged without a call, because the
            inbox knows that every handler had succeeded before. `retried`: the message was requeued, with a delay.
            `dead_lettered`: the message is in the dead-letter queue. `given_up`: the message could not be handled and
            is lost, because the transport has no dead-letter queue. `unsettled`: the handling was cancelled, or the
            delivery could not be settled; the transport redelivers the message if it can.
        reason: Why the message was not acknowledged; None if it was. It begins with a fixed word and a colon: `failed`
            (it is requeued), `retries-exhausted`, `retry-refused`, `permanent`, `undecodable`, `mismatch` or
            `poison-message`; or it is `cancelled`, `ended by …` or `not settled: …`. It names each handler that failed,
            with the type of its error.
        error: The error of the last attempt; None if there was none. If the event has several handlers, it is an
            `EventHandlersFailed`, with one error for each handler that failed.
        seconds: How long the handling took, with its immediate retries.
        retries: How many immediate retries were made.
        errors: The errors of all attempts, in their order, also of those that a retry has healed. Each error has a note
            that names its handler.
    """

    topic: Topic
    group: str | None = None
    message_id: UUID | None
    attempt: int
    outcome: Outcome
    reason: str | None
    error: BaseException | None
    seconds: float
    retries: int = 0
    errors: tuple[BaseException, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutboxState:
    """
    The state of an outbox, as a relay reports it. Each attribute but the last is that of `diator.outbox.store.Status`.

    Attributes:
        pending: How many messages are due and not sent yet.
        oldest: For how many seconds the oldest of them has been due.
        scheduled: How many messages wait for their time.
        dead: How many messages are dead.
        blocked: How many messages wait behind a dead one with their key.
        blocked_keys: How many keys have a dead message.
        held_back: How many messages wait for an open transaction of the database.
        held_back_for: For how many seconds that transaction has been open.
        lease_lost: How many messages had lost their lease when this relay finished them.
    """

    pending: int
    oldest: float
    scheduled: int
    dead: int
    blocked: int
    blocked_keys: int
    held_back: int
    held_back_for: float
    lease_lost: int


class Instrument(Protocol):
    """
    Observes what diator does. Derive a class from it, and override what you need: each method does nothing.

    A program passes it as `instrument=…` to a mediator, an emitter, a consumer or a relay. An error of an instrument
    changes nothing: it is logged, once for each method and type of error. The methods are called in the task of what
    they observe, so a context variable that one of them sets is seen there. They must not block.
    """

    def handling(self, request: object, /) -> AbstractContextManager[object]:
        """Surround `Mediator.send`: the middlewares, the handler, and the sending of its events."""
        return nullcontext()

    def headers(self, event: object, /) -> Mapping[str, str]:
        """Return headers for the message of *event*, such as a trace context. Called inside the unit of work."""
        return {}

    def sending(self, messages: Sequence[Message], broker: object, /) -> AbstractContextManager[object]:
        """Surround the sending of *messages*, at least one. The context receives the send error."""
        return nullcontext()

    def processing(self, context: MessageContext, broker: object, /) -> AbstractContextManager[object]:
        """
        Surround the handling of a message in a consumer: the handlers, what they send, and the settlement.

        The context receives the last error of the handlers, and cannot swallow it. A message that cannot be decoded is
        only `settled`. A dead letter may still be on its way when the context ends.
        """
        return nullcontext()

    def settled(self, handled: Handled, broker: object, /) -> None:
        """Observe the outcome of each delivery, as `on_handled` does. Mostly, its `processing` has not ended yet."""
        return  # otherwise it would be an abstract method for mypy

    def outbox(self, state: OutboxState, broker: object, /) -> None:
        """Observe the state of an outbox, which its relay reports four times a minute. *broker* sends its messages."""
        return


_METHODS = ("handling", "headers", "sending", "processing", "settled", "outbox")


class Observer:
    """An instrument beside its broker. Its errors are logged, and reach nobody."""

    def __init__(self, instrument: Instrument, broker: object = None) -> None:
        self._instrument = instrument
        self._broker = broker
        self._logged: set[tuple[str, type]] = set()

    def handling(self, request: object) -> AbstractContextManager[None]:
        return _Around(self, "handling", lambda: self._instrument.handling(request))

    def headers(self, event: object) -> Mapping[str, str]:
        return self.call("headers", lambda: _checked(self._instrument.headers(event))) or {}

    def sending(self, messages: Sequence[Message]) -> AbstractContextManager[None]:
        return _Around(self, "sending", lambda: self._instrument.sending(messages, self._broker))

    def processing(self, context: MessageContext) -> _Around:
        return _Around(self, "processing", lambda: self._instrument.processing(context, self._broker))

    def settled(self, handled: Handled) -> None:
        self.call("settled", lambda: self._instrument.settled(handled, self._broker))

    def outbox(self, state: OutboxState) -> None:
        self.call("outbox", lambda: self._instrument.outbox(state, self._broker))

    def call(self, method: str, call: Callable[[], T]) -> T | None:
        """Return the result of *call*; None after an error."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001  # it is logged
            self.note(method, error)
            return None

    def note(self, method: str, error: Exception) -> None:
        """Log *error*, unless one of its type was logged for this method."""
        if (kind := (method, type(error))) not in self._logged:
            self._logged.add(kind)
            name, error_type = name_of(type(self._instrument)), name_of(type(error))
            line = "%s.%s failed with %s; diator ignores this, and logs it once"
            fields = {**log_fields(), "instrument": name, "method": method, "error_type": error_type}
            logger.error(line, name, method, error_type, exc_info=error, extra=fields)


def _checked(headers: Mapping[str, str]) -> Mapping[str, str]:
    check_headers(headers, "headers")
    return headers


class _Around(AbstractContextManager[None]):
    """The context of an instrument, without its errors."""

    __slots__ = ("_begin", "_entered", "_method", "_observer")

    def __init__(self, observer: Observer, method: str, begin: Callable[[], AbstractContextManager[object]]) -> None:
        self._observer = observer
        self._method = method
        self._begin = begin
        self._entered: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        context = self._observer.call(self._method, self._begin)
        try:
            if context is not None:
                context.__enter__()
                self._entered = context
        except Exception as failed:  # noqa: BLE001  # it is logged
            self._observer.note(self._method, failed)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Leave the context, as if *error* was raised in it."""
        if self._entered is not None:
            try:
                trace = None if error is None else error.__traceback__
                self._entered.__exit__(None if error is None else type(error), error, trace)
            except Exception as failed:  # noqa: BLE001  # it is logged
                if failed is not error:
                    failed.__cause__ = failed.__context__ = None  # the text of *error* may quote the message
                    self._observer.note(self._method, failed)


def observer_of(instrument: Any, broker: object = None) -> Observer | None:
    """
    Return *instrument* beside *broker*; None if there is none.

    Raises:
        ConfigurationError: It is not an instrument.
    """
    if instrument is None:
        return None
    if isinstance(instrument, type) or not all(callable(getattr(instrument, each, None)) for each in _METHODS):
        raise ConfigurationError(
            "instrument must be an object whose class derives from diator.instruments.Instrument, or has the methods "
            f"{', '.join(_METHODS)}, and it is {described(instrument)}"
        )
    for each in _METHODS:
        if inspect.iscoroutinefunction(getattr(instrument, each)):
            raise ConfigurationError(f"{name_of(type(instrument))}.{each} is asynchronous; write it without `async`")
    return Observer(instrument, broker)
