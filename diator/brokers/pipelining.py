"""A connection on which many messages are under way at once, for a service that answers each of them later."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import Context
from typing import Any, Generic, Protocol, Self, TypeVar
from uuid import UUID

import msgspec

from diator._text import explained
from diator.brokers.batching import own_error
from diator.brokers.connecting import ClientConnection
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed, BrokerError, BrokerUnavailable, DiatorError, OutcomeUnknown

K = TypeVar("K")


class InFlight(msgspec.Struct, eq=False, gc=False):
    """
    A message that was written and not answered.

    Attributes:
        answer: What its caller waits for.
        message_id: Its id, for errors.
        size: Its size in bytes.
        deadline: When its caller must have a result, by the clock of the event loop.
    """

    answer: asyncio.Future[Any]
    message_id: UUID | None
    size: int
    deadline: float

    def fail(self, error: BrokerError) -> None:
        """Give *error* to its caller, unless the caller has a result or was cancelled. It stays in flight."""
        self.deadline = math.inf
        if not self.answer.done():
            self.answer.set_exception(own_error(error, self.message_id))


class Pipeline(ABC, Generic[K]):
    """
    One connection to a service that takes many messages before it answers the first. A transport derives its own.

    The subclass writes a message and calls `expect` with the key of its answer, which no other message in flight has: a
    number or an id. (If the service answers in order, the subclass counts the messages and the answers.) The future
    that `expect` returns ends once, by the first of these:

    - The subclass calls `answered`: with the result, or with the error.
    - The deadline passes: with `OutcomeUnknown`. The message loses its place, and a later answer is ignored. If the
      service has answered nothing for *silence* seconds, the connection counts as lost.
    - The subclass calls `lose`: with the error of the connection.

    Each caller receives an error of its own, with its own `message_id`. If a caller is cancelled, the answer to its
    message goes to nobody. One timer watches all deadlines: a message costs neither a task nor a timer.

    Args:
        retire: Called when the connection is lost: `PipelinedConnection.retire`.
        silence: Half of the time limit of a call. It is shorter than a call, since a message may be written late.
        max_in_flight: How many messages wait for their answers at most.
        max_bytes: Nothing is written while so many bytes, or more, wait for their answers.

    Attributes:
        in_flight: The messages that wait for their answers, by key, in the order of `expect`.
        has_room: Whether another message may be written.
        is_lost: Whether `lose` was called.
    """

    def __init__(
        self, retire: Callable[[Any], None], *, silence: float, max_in_flight: int, max_bytes: int = 4 * 1024 * 1024
    ) -> None:
        self.in_flight: dict[K, InFlight] = {}
        self.has_room: bool = True
        self.is_lost: bool = False
        self._loop = asyncio.get_running_loop()
        self._retire = retire
        self._silence = silence
        self._max_in_flight, self._max_bytes = max_in_flight, max_bytes
        self._bytes = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._has_answered, self._silent_since = True, 0.0  # whether the service has, since that time
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf

    async def room(self) -> None:
        """Wait until an answer has arrived, a deadline has passed, or the connection is lost."""
        if not self.is_lost:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def expect(self, key: K, message_id: UUID | None, size: int, deadline: float) -> asyncio.Future[Any]:
        """Return the future of the answer to a message of *size* bytes, which is written now."""
        answer = self._loop.create_future()
        self.in_flight[key] = InFlight(answer, message_id, size, deadline)
        self._bytes += size
        if len(self.in_flight) >= self._max_in_flight or self._bytes >= self._max_bytes:
            self.has_room = False
        if deadline < self._alarm_at:
            self._watch(deadline, self._loop.time())
        return answer

    def answered(self, key: K, result: Any = None, *, error: BrokerError | None = None) -> None:
        """Note the answer to a message. Its future ends with *result*, or with *error*."""
        self._has_answered = True
        message = self.in_flight.pop(key, None)
        if message is None:
            return  # it was overdue
        self._bytes -= message.size
        if error is not None:
            message.fail(error)
        elif not message.answer.done():
            message.answer.set_result(result)
        if self._waiters or not self.has_room:
            self._note_change()

    def lose(self, error: BrokerError) -> None:
        """Note that no answer will arrive any more. The callers that still wait get *error*: mostly OutcomeUnknown."""
        if self.is_lost:
            return
        self.is_lost = True
        if self._alarm is not None:
            self._alarm.cancel()
        for message in self.in_flight.values():
            message.fail(error)
        self.in_flight.clear()
        self._note_change()
        self._retire(self)

    def check_deadlines(self) -> None:
        """Handle the overdue messages. The timer calls it at the earliest deadline; a subclass may check more."""
        now = max(self._loop.time(), self._alarm_at)  # a timer may be early, by its resolution
        silent = not self._has_answered and now - self._silent_since >= self._silence
        if self._has_answered and self.in_flight:
            self._has_answered, self._silent_since = False, self._alarm_at
        for key in [key for key, message in self.in_flight.items() if message.deadline <= now]:
            if not self.is_lost:
                self.overdue(key, silent=silent)
        self._note_change()
        self._alarm, self._alarm_at = None, math.inf
        earliest = min((message.deadline for message in self.in_flight.values()), default=math.inf)
        if earliest < math.inf:
            self._watch(earliest, now)

    def overdue(self, key: K, *, silent: bool) -> None:
        """
        Fail a message at its deadline. A subclass may do otherwise.

        *silent*: whether no answer to any message has arrived for *silence* seconds.
        """
        if silent:
            self.lose(OutcomeUnknown("the service was silent; it may have arrived"))
        else:
            message = self.in_flight.pop(key)
            self._bytes -= message.size
            message.fail(OutcomeUnknown("the service has not confirmed it in time; it may still arrive"))

    async def finish(self) -> None:
        """Wait until every caller has its result."""
        while not all(message.answer.done() for message in self.in_flight.values()):
            await self.room()

    @abstractmethod
    async def close(self) -> None:
        """Close the connection: at once if it is lost, else in an orderly way and in a limited time."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _watch(self, deadline: float, now: float) -> None:
        """Set the timer: for the time from which answers are noticed, else for *deadline*. It belongs to no caller."""
        if self._alarm is not None:
            self._alarm.cancel()
        begin = deadline - 1.1 * self._silence  # a little earlier, since times are rounded
        self._alarm_at = begin if begin > now else deadline
        self._alarm = self._loop.call_at(self._alarm_at, self.check_deadlines, context=Context())

    def _note_change(self) -> None:
        self.has_room = len(self.in_flight) < self._max_in_flight and self._bytes < self._max_bytes
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Link(Protocol):
    @property
    def has_room(self) -> bool: ...
    async def room(self) -> None: ...
    async def finish(self) -> None: ...
    async def close(self) -> None: ...


P = TypeVar("P", bound=_Link)


class PipelinedConnection(ClientConnection[P]):
    """
    A client connection through which many callers send at once, without waiting for each other's answers.

    A subclass writes `_connect`, which returns a `Pipeline`, and the calls: each gets the pipeline from `_ready` and
    writes to it before it waits for anything else. So messages are written in the order of the calls. It writes
    `_not_sent` as well, if some errors of `_connect` have another meaning than `BrokerUnavailable`.

    A message that is not written by its deadline raises `BrokerUnavailable`. A message that is written has its result
    from the pipeline. After a loss, the next call connects again. `aclose` ends the subscriptions, which may send until
    then; after that it refuses calls, waits until every message that was written has its result, and closes the
    connection.

    Attributes:
        service: The name of the service, for error texts.
    """

    service = "the service"
    _is_over = False  # set when the subscriptions have ended: they send until then

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        await self._ready(self._bind_to_running_loop().time() + self.timeout)

    def retire(self, link: P) -> None:
        """Use another connection from now on, and close *link* when all that wait on it have their results."""
        if self._link is link:
            self._link = None
            self._background.start(self._end(link), f"closing a connection to {self.where}")

    async def _ready(self, deadline: float, message_id: UUID | None = None) -> P:
        """
        Return a connection with room, in the turn of this call.

        Raises:
            BrokerUnavailable: There is none by the *deadline*, or the attempt to connect has failed.
            BrokerClosed: `aclose` was called.
        """
        link = self._link
        if link is not None and not self._queued and link.has_room:
            return link
        attempts = self._attempts
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                while True:
                    link = None if self._is_over else await self._connected(attempts)
                    if link is None or self._is_over:
                        break
                    if link.has_room:
                        return link
                    await link.room()
        except DiatorError as error:
            raise (own_error(error, message_id) if isinstance(error, BrokerError) else error) from error.__cause__
        except Exception as error:
            raise self._not_sent(error, message_id) from error
        finally:
            self._queued -= 1
        raise BrokerClosed("this broker is closed", message_id=message_id)

    def _not_sent(self, error: Exception, message_id: UUID | None) -> DiatorError:
        """Translate what `_connect` raised, or the end of a call that waited. Nothing was sent."""
        if isinstance(error, TimeoutError) and error is not self._failure:
            full = f"earlier messages took all of {self.timeout:g} s"
            why = self._no_connection() if self._link is None else full
        else:
            why = explained(error, within=self._reconnect.connect_timeout)
        return BrokerUnavailable(f"{self.service} at {self.where} is not available ({why})", message_id=message_id)

    async def _close(self) -> None:
        await close_all(self.subscriptions)
        self._is_over = True
        async with self._lock:  # after the callers that were waiting already
            link = await self._take_link()
        if link is not None:
            await self._end(link)
        await self._background.wait()

    async def _end(self, link: P) -> None:
        await link.finish()
        await link.close()
