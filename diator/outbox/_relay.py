"""Send what an outbox has stored."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

from diator._deadlines import Deadline, Deadlines
from diator._handling import current_task
from diator._hints import described, name_of
from diator._log import RepeatedLines
from diator._options import check_counts, check_functions, check_numbers, check_times, check_type, word
from diator._running import CANCEL_TIMEOUT, Running
from diator._text import printable, without_credentials
from diator.brokers.message import Message, Topic
from diator.brokers.supervisor import ReconnectPolicy
from diator.exceptions import BrokerError, BrokerUnavailable, ConfigurationError
from diator.instruments import Instrument, OutboxState, observer_of
from diator.outbox._outbox import Outbox
from diator.outbox._results import Destination, Hand, Pace, Result, failure_of, groups, result_of
from diator.outbox.store import Claim, Failure, OnDead, Order, Row, Status

logger: logging.Logger = logging.getLogger("diator.outbox.relay")

#: How long a result waits for the others of its claim, before it is reported to the database, in seconds.
_LINGER = 0.05
#: How long the relay waits after an error of the database.
_DATABASE = ReconnectPolicy(first_delay=0.1, max_delay=5.0)
#: How often the state of the outbox is reported to an instrument, in seconds.
_REPORT_EVERY = 15.0

Outcome: TypeAlias = Literal["sent", "retried", "dead"]


@dataclass(frozen=True, kw_only=True)
class Relayed:
    """
    The outcome of one attempt to send a message of an outbox. It contains nothing of the message except its id.

    Attributes:
        topic: The destination of the message.
        message_id: The id of the message.
        position: The number of its row.
        attempt: 1 for the first attempt, 2 for the second.
        outcome: `sent`: the broker has confirmed it. `retried`: it is sent again later. `dead`: it is not sent any
            more, until somebody redrives it.
        reason: Why it was not sent; None if it was. It begins with a fixed word and a colon: `failed`, `unknown` (it
            may have arrived), `unavailable`, `rejected`, `retries-exhausted`; then the type of the error.
        error: The error of the send; None if there was none.
        seconds: How long the send took.
    """

    topic: Topic
    message_id: UUID
    position: int
    attempt: int
    outcome: Outcome
    reason: str | None
    error: BaseException | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RelayHealth:
    """
    The state of a relay, for a health check. What waits in the outbox is in `Relay.status`.

    Attributes:
        relaying: Whether `Relay.run` sends messages: it has begun, and `stop` was not called.
        unavailable_for: For how many seconds the destination could not be reached; 0 while it can.
        database_failing_for: For how many seconds the database has failed; 0 while it answers.
        since_last_progress: For how many seconds messages have been claimed, and none of them was tried; 0 without any.
        in_flight: How many messages are being sent.
        oldest_in_flight: For how many seconds the oldest of these has been sent; 0 if there are none.
        sent: How many messages were sent.
        retried: How often a message was not sent, and will be sent again.
        dead: How many messages died.
        lease_lost: How many rows had lost their lease when they were finished: another relay may have sent them too.
    """

    relaying: bool
    unavailable_for: float
    database_failing_for: float
    since_last_progress: float
    in_flight: int
    oldest_in_flight: float
    sent: int
    retried: int
    dead: int
    lease_lost: int


class Relay(Running):
    """
    Sends the messages of *outbox* to its broker, and deletes each when the broker has confirmed it.

    A message is sent at least once: if the process dies after the send, or the outcome is unknown, it is sent again
    with the same id. Messages with the same key are sent in the order in which they were stored, one after the other,
    also by several relays. What a send error means:

    - The destination cannot be reached (`BrokerUnavailable`, `AccessRefused`): the relay pauses, and tests it with one
      message after the other, with growing pauses of at most 30 s. No attempt is counted, however long that takes.
    - `OutcomeUnknown`: the message is sent again, as often as it takes.
    - `MessageRejected`, `EncodingError`: the message is dead.
    - Any other error: it is sent again, with growing pauses, and dead after *max_attempts*: by default about an hour.

    Any number of relays, in any processes, may serve one outbox. A program that only relays calls `run`. Beside other
    work a relay is a context manager: `async with broker, Relay(outbox):` relays during the block, and ends gracefully
    with it. If the relay fails during the block, the block is cancelled and the error is raised. An error of the
    database or of the destination does not end a relay that has begun: it waits, and goes on.

    Use a relay in one event loop; another thread calls `loop.call_soon_threadsafe(relay.stop)`.

    Args:
        outbox: The outbox. The relay closes neither its broker nor its database.
        order: `key`: as said above. `none`: in no order, which is faster with several relays.
        batch: How many messages are claimed at once. The relay holds at most twice as many.
        concurrency: How many messages are sent at once. Each may take the `timeout` of the broker, 10 s if it has none;
            then it is cancelled, and its outcome is unknown.
        lease: For how many seconds claimed messages are this relay's own. If its process dies, others send them after
            that. Default: 30, or three times the `timeout` of the broker, if that is longer.
        poll: The shortest and the longest wait for news, in seconds. It grows while nothing is stored. A database that
            tells when something was stored ends it at once.
        max_attempts: How often a message that fails is tried.
        on_dead: Whether later messages with the key of a dead one wait (`block`) or are sent (`skip`).
        drain_timeout: How long `run` waits for messages in flight after `stop`, in seconds.
        instrument: Observes the sends, and the state of the outbox, for telemetry.
        on_relayed: Called with the outcome of each attempt. The relay logs an error of this function.

    Raises:
        ConfigurationError: An argument is out of range, or a lease would be over before a send can be.
    """

    def __init__(
        self,
        outbox: Outbox[Any],
        *,
        order: Order = "key",
        batch: int = 200,
        concurrency: int = 100,
        lease: float | None = None,
        poll: tuple[float, float] = (0.05, 5.0),
        max_attempts: int = 20,
        on_dead: OnDead = "block",
        drain_timeout: float = 20.0,
        instrument: Instrument | None = None,
        on_relayed: Callable[[Relayed], None] | None = None,
    ) -> None:
        check_counts(1, batch=batch, concurrency=concurrency, max_attempts=max_attempts)
        check_numbers(0, drain_timeout=drain_timeout)
        check_functions(on_relayed=on_relayed)
        if lease is not None:
            check_times(lease=lease)
        _check(order, on_dead, poll)
        super().__init__("relay", "had begun", drain_timeout)
        check_type("outbox", outbox, Outbox, is_needed=True)
        broker = outbox.to
        timeout = getattr(broker, "timeout", None)
        if not isinstance(timeout, int | float):
            timeout = 10.0
        self._lease = max(30.0, 3 * timeout) if lease is None else lease
        self._longest_send = timeout + min(1.0, timeout / 10)  # the broker's own limit comes first
        _check_lease(self._lease, self._longest_send, math.ceil(batch / concurrency) * timeout)
        self._broker = broker
        self._codec = outbox.codec
        self._store = outbox.messages
        self._order: Order = order
        self._on_dead: OnDead = on_dead
        self._batch = batch
        self._concurrency = concurrency
        self._max_attempts = max_attempts
        self._on_relayed = on_relayed
        self._observer = observer_of(instrument, broker)
        self._send = broker.send_message if self._observer is None else self._send_observed

        #: The attributes of each log record about this relay.
        self._fields: dict[str, object] = {"broker": type(broker).__name__, "concurrency": concurrency}
        self._lines = RepeatedLines(logger, self._fields)
        self._destination = Destination()
        self._pace = Pace(*poll)
        self._deadlines = Deadlines(self._longest_send)
        self._relaying = False
        self._queue: asyncio.Queue[tuple[Hand, list[Row]]] = asyncio.Queue()
        self._hands: dict[Hand, None] = {}  # the oldest first
        self._held = 0
        self._claiming: tuple[asyncio.Task[Claim], float] | None = None
        self._has_room = True
        self._may_free_keys = False
        self._wake = asyncio.Event()  # the claims
        self._has_results = asyncio.Event()
        self._has_complete = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._sending: dict[int, float] = {}
        self._progress_at = self._failing_since = 0.0
        self._database_errors: set[tuple[str, type]] = set()
        self._sent = self._retried = self._dead = self._lease_lost = 0

    async def run(self, *, signals: bool = True) -> None:
        """
        Relay until `stop` is called. A relay runs once.

        With *signals*, SIGTERM and SIGINT stop the relay: the first signal starts a graceful shutdown, a second one
        ends it at once. A handler that was there before, such as that of a web server, is called too. If `run` is
        cancelled, it releases the messages that it has claimed, if the database answers soon.

        Raises:
            UsageError: This relay was run before.
            ConfigurationError: The tables do not fit.
            BrokerClosed: The broker was closed.
            Exception: An error of the database at the start.
        """
        await super().run(signals=signals)

    async def ready(self) -> None:
        """
        Wait until the relay has begun: it has checked the tables.

        Another task calls `run`; it need not have begun.

        Raises:
            Exception: The error of `run`, if it ended before that.
            UsageError: The relay was stopped, or `run` was cancelled, before that.
        """
        await super().ready()

    def stop(self) -> None:
        """
        Start a graceful shutdown: claim nothing more, finish the sends in flight, and let `run` return.

        Messages that were claimed and not begun are released. After *drain_timeout* seconds, `run` cancels the sends
        that still run: these messages are sent again. A second call of `stop` does so at once, and so does a second
        signal; one signal and one call do not. `stop` itself returns immediately.
        """
        super().stop()

    async def status(self) -> Status:
        """Return what waits in the outbox. It asks the database."""
        return await self._store.status()

    def health(self) -> RelayHealth:
        """Return the state of this relay. Cheap, and callable at any time, also in another thread."""
        now, sending, destination = monotonic(), [*self._sending.values()], self._destination
        return RelayHealth(
            relaying=self._relaying and not self._stopping.is_set(),
            unavailable_for=now - destination.since if destination.failures else 0.0,
            database_failing_for=now - self._failing_since if self._database_errors else 0.0,
            since_last_progress=now - self._progress_at if self._held else 0.0,
            in_flight=len(sending),
            oldest_in_flight=now - min(sending, default=now),
            sent=self._sent,
            retried=self._retried,
            dead=self._dead,
            lease_lost=self._lease_lost,
        )

    # -- running -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        if not await self._is_checked():
            return
        logger.info("relaying %s", self._about(), extra=self._fields)
        failed: str | None = None
        try:
            self._relaying = True
            self._set_ready()
            await self._relay()
        except BaseException as error:
            failed = name_of(type(error))
            raise
        finally:
            self._relaying = False
            end = f"{self._about()} ({failed})" if failed else self._about()
            logger.info("stopped relaying %s", end, extra={**self._fields, "error_type": failed})

    async def _is_checked(self) -> bool:
        """Check the tables. Return False if `stop` is called before that is done."""
        checking = asyncio.ensure_future(self._store.check())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({checking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not checking.done():
                return False
            checking.result()
            return True
        finally:
            checking.cancel()
            stopping.cancel()

    async def _relay(self) -> None:
        finishing = _start(self._finish_all())
        claiming = _start(self._claim_all())
        tasks = [claiming, finishing, *(_start(self._work()) for _ in range(self._concurrency))]
        if self._observer is not None:
            tasks.append(_start(self._report()))
        try:
            await self._until_drained(tasks, lambda: self._drain(claiming))
        finally:
            await self._end(tasks, finishing)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _drain(self, claiming: asyncio.Task[None]) -> None:
        """Release what was not begun, wait for what was, and tell the database."""
        await asyncio.wait({claiming})
        self._release_queue()
        await self._until_empty()

    async def _until_empty(self) -> None:
        while self._hands:
            self._is_empty.clear()
            await self._is_empty.wait()

    async def _end(self, tasks: Sequence[asyncio.Task[None]], finishing: asyncio.Task[None]) -> None:
        """Cancel what still runs, and tell the database what it has become, if that answers soon."""
        others = {each for each in tasks if each is not finishing}
        for each in others:
            each.cancel()
        await asyncio.wait(others, timeout=CANCEL_TIMEOUT)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT):
                if self._claiming is not None:
                    claiming, began = self._claiming
                    with suppress(Exception):
                        self._take(await claiming, began)
                self._release_queue()
                await self._until_empty()
        if self._held:
            line = "stopped before the database knew what became of %d messages; they are sent again after their lease"
            logger.warning(line, self._held, extra=self._fields)
        finishing.cancel()
        await asyncio.wait({finishing}, timeout=CANCEL_TIMEOUT)
        self._deadlines.close()
        self._lines.flush()
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT):
                await self._store.close()
        except Exception as error:  # noqa: BLE001  # what was to be released is the database's to end
            logger.warning("the store could not be closed: %s", _explained(error), extra=self._fields)

    def _shut_down(self) -> None:
        super()._shut_down()
        self._wake.set()

    # -- claiming ----------------------------------------------------------------------------------------------------

    async def _claim_all(self) -> None:
        failures, was_woken = 0, False
        while not self._stopping.is_set():
            self._wake.clear()
            self._has_room = self._held <= self._batch
            if not self._has_room:
                await self._wake.wait()
                continue
            now, destination = monotonic(), self._destination
            if (is_probe := destination.failures > 0) and (self._held or now < destination.probe_at):
                await self._sleep(max(destination.probe_at - now, _LINGER))
                continue
            limit = 1 if is_probe else self._batch
            self._may_free_keys = self._held > 0 and self._order == "key"
            self._claiming = asyncio.ensure_future(self._claim(limit)), now
            try:
                claim = await asyncio.shield(self._claiming[0])
            except Exception as error:  # noqa: BLE001  # it is logged
                self._note_database_error("claim", error)
                await self._sleep(_DATABASE.delay(failures))
                failures += 1
                continue
            finally:
                if self._claiming[0].done():
                    self._claiming = None
            failures = 0
            self._note_database_answer("claim")
            self._take(claim, now, is_probe=is_probe)
            wait = self._pace.wait_after(len(claim.rows), limit, next_due=claim.next_due, was_woken=was_woken)
            was_woken = await self._wait_for_news(wait) if wait else False

    async def _claim(self, limit: int) -> Claim:
        return await self._store.claim(limit=limit, lease=self._lease, order=self._order, on_dead=self._on_dead)

    async def _sleep(self, seconds: float) -> None:
        """Wait, at most until the claims are woken."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _wait_for_news(self, seconds: float) -> bool:
        """Wait until messages were stored, or the claims are woken. Return whether messages were stored."""
        began = monotonic()
        news, wake = asyncio.ensure_future(self._store.wait(seconds)), asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({news, wake}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
            wake.cancel()
        await asyncio.wait({news})
        if not news.cancelled() and (error := news.exception()) is not None:
            self._note_database_error("wait", error)
            await self._sleep(seconds)
            return False
        if news.cancelled():
            return False
        self._note_database_answer("wait")
        return monotonic() - began < seconds * 0.9

    def _take(self, claim: Claim, began: float, *, is_probe: bool = False) -> None:
        """Take the rows of *claim*, whose lease may have begun when the call *began*."""
        if not claim.rows:
            return
        hand = Hand(claim.lease, began + self._lease, len(claim.rows), is_probe=is_probe)
        if not self._held:
            self._progress_at = monotonic()
        self._hands[hand] = None
        self._held += len(claim.rows)
        for rows in groups(claim.rows, self._order):
            self._queue.put_nowait((hand, rows))

    # -- sending -----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        deadline = self._deadlines.limit(current_task())
        while True:
            hand, rows = await self._queue.get()
            try:
                await self._send_in_order(hand, rows, deadline)
            finally:
                self._note_results(hand)
            del hand, rows  # a worker that waits keeps nothing alive

    async def _send_in_order(self, hand: Hand, rows: Sequence[Row], deadline: Deadline) -> None:
        for index, row in enumerate(rows):
            began = monotonic()
            if not self._may_send(hand, began):
                hand.untried(rows[index:], began)
                return
            self._sending[row.position] = began
            error: BaseException | None = None
            deadline.begin(began)
            try:
                await self._send(self._message(row))
            except (Exception, asyncio.CancelledError) as failure:  # noqa: BLE001  # it has its result
                error = failure
            finally:
                del self._sending[row.position]
            error = deadline.end(error)
            now = self._progress_at = monotonic()
            if error is None:
                hand.sent(row, now)
                self._sent += 1
                if self._destination.answered(now):
                    self._note_destination_back(now)
                self._report_attempt(row, "sent", None, None, now - began)
                continue
            if type(error) is asyncio.CancelledError and deadline.task.cancelling():
                cancelled = Failure(position=row.position, reason="unknown: CancelledError", retry_after=0.0)
                hand.failed(cancelled, now)
                hand.untried(rows[index + 1 :], now)
                raise error
            self._note_error(hand, rows[index:], error, "unknown" if deadline.is_over else result_of(error), began)
            return

    def _may_send(self, hand: Hand, now: float) -> bool:
        return (
            hand.may_send(now, self._longest_send)
            and not self._stopping.is_set()
            and (not self._destination.failures or hand.is_probe)
        )

    def _message(self, row: Row) -> Message:
        return row.message if self._codec is None else replace(row.message, codec=self._codec)

    async def _send_observed(self, message: Message) -> None:
        assert self._observer is not None  # noqa: S101
        with self._observer.sending([message]):
            await self._broker.send_message(message)

    def _note_error(self, hand: Hand, rows: Sequence[Row], error: BaseException, result: Result, began: float) -> None:
        """Note what *error*, of the first of *rows*, means for them and for the destination."""
        row, now, destination = rows[0], monotonic(), self._destination
        if result == "closed":
            hand.untried(rows, now)
            raise error
        is_away = isinstance(error, BrokerUnavailable) or (
            result in ("unavailable", "unknown") and not destination.has_answered_since(began)
        )
        if is_away:
            if destination.failed(began, now):
                self._note_destination_away(error)
        elif result in ("rejected", "failed") and destination.answered(now):
            self._note_destination_back(now)
        if is_away and result == "unavailable":
            hand.untried(rows, now)
            return
        failure = failure_of(row, result, error, self._max_attempts)
        hand.failed(failure, now)
        hand.untried(rows[1:], now)
        self._log_failure(row, failure, error)
        is_dead = failure.retry_after is None
        if is_dead:
            self._dead += 1
        else:
            self._retried += 1
        self._report_attempt(row, "dead" if is_dead else "retried", failure.reason, error, now - began)

    def _report_attempt(
        self, row: Row, outcome: Outcome, reason: str | None, error: BaseException | None, seconds: float
    ) -> None:
        if self._on_relayed is None:
            return
        message = row.message
        try:
            self._on_relayed(
                Relayed(
                    topic=Topic(message.message_type, message.message_name),
                    message_id=message.message_id,
                    position=row.position,
                    attempt=row.attempts,
                    outcome=outcome,
                    reason=reason,
                    error=error,
                    seconds=seconds,
                )
            )
        except Exception:
            logger.exception("on_relayed failed", extra=self._fields)

    def _release_queue(self) -> None:
        while not self._queue.empty():
            hand, rows = self._queue.get_nowait()
            hand.untried(rows, monotonic())
            self._note_results(hand)

    # -- finishing ---------------------------------------------------------------------------------------------------

    def _note_results(self, hand: Hand) -> None:
        self._has_results.set()
        if hand.open == 0:
            self._has_complete.set()

    async def _finish_all(self) -> None:
        """Tell the database about each claim when all its rows have their result, or the first waits for others."""
        failures = 0
        while True:
            await self._has_results.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    await self._has_complete.wait()
            self._has_results.clear()
            self._has_complete.clear()
            has_failed = False
            for hand in [*self._hands]:
                if hand.has_results and (hand.open == 0 or monotonic() - hand.noted_at >= _LINGER):
                    has_failed = not await self._finish(hand) or has_failed
                if hand.has_results:
                    self._has_results.set()
            if has_failed:
                await asyncio.sleep(_DATABASE.delay(failures))
            failures = failures + 1 if has_failed else 0

    async def _finish(self, hand: Hand) -> bool:
        """Report the results of *hand*. Return whether that is done."""
        results = hand.take()
        count = sum(map(len, results))
        try:
            lost = await self._store.finish(
                hand.lease, sent=results.sent, untried=results.untried, failed=results.failed
            )
        except Exception as error:  # noqa: BLE001  # it is logged
            self._note_database_error("finish", error)
            if monotonic() < hand.until:
                hand.put_back(results)
                return False
            line = "what became of %d messages could not be reported to the database before their lease ended; %s"
            logger.warning(line, count, "those that were sent are sent again", extra=self._fields)
        except BaseException:
            hand.put_back(results)
            raise
        else:
            self._note_database_answer("finish")
            if lost and not hand.was_reported:
                self._lease_lost += lost
                line = "%d of %d messages had lost their lease; another relay may have sent them as well"
                logger.warning(line, lost, count, extra={**self._fields, "lease_lost": lost})
        self._held -= count
        if hand.open == 0 and not hand.has_results:
            del self._hands[hand]
            if not self._hands:
                self._is_empty.set()
        if self._may_free_keys or not self._has_room or results.untried or results.failed:
            self._wake.set()
        return True

    # -- beside ------------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Tell the instrument the state of the outbox now and then."""
        while self._observer is not None:
            try:
                status = await self._store.status()
            except Exception as error:  # noqa: BLE001  # it is logged
                self._note_database_error("status", error)
            else:
                self._note_database_answer("status")
                self._observer.outbox(_state(status, self._lease_lost))
            await asyncio.sleep(_REPORT_EVERY)

    # -- logs --------------------------------------------------------------------------------------------------------

    def _about(self) -> str:
        broker, where = type(self._broker).__name__, getattr(self._broker, "where", "")
        return (
            f"an outbox to {broker}{f' at {where}' if where else ''}, order {self._order}, "
            f"concurrency {self._concurrency}"
        )

    def _note_destination_away(self, error: BaseException) -> None:
        line = "the destination cannot be reached: %s; the relay pauses, and no attempt is counted meanwhile"
        self._lines.log(
            logging.WARNING,
            "pauses of the relay",
            line,
            _explained(error),
            fields=lambda: {"error_type": name_of(type(error))},
        )

    def _note_destination_back(self, now: float) -> None:
        seconds = now - self._destination.since
        line = "the destination can be reached again, after %.1f s"
        self._lines.log(logging.INFO, "ends of a pause of the relay", line, seconds)
        self._wake.set()

    def _note_database_error(self, call: str, error: BaseException) -> None:
        if not self._database_errors:
            self._failing_since = monotonic()
        if (kind := (call, type(error))) not in self._database_errors:
            self._database_errors.add(kind)
            line = "the database has failed to %s: %s; the relay tries again"
            logger.warning(line, call, _explained(error), extra={**self._fields, "error_type": name_of(type(error))})

    def _note_database_answer(self, call: str) -> None:
        if self._database_errors:
            self._database_errors = {kind for kind in self._database_errors if kind[0] != call}
            if not self._database_errors:
                line = "the database answers again, after %.1f s"
                logger.info(line, monotonic() - self._failing_since, extra=self._fields)

    def _log_failure(self, row: Row, failure: Failure, error: BaseException) -> None:
        message = row.message

        def fields() -> dict[str, object]:
            return {
                "message_id": str(message.message_id),
                "message_name": message.message_name,
                "position": row.position,
                "attempt": row.attempts,
                "reason": failure.reason,
                "error_type": name_of(type(error)),
            }

        about = message.message_name, message.message_id, row.attempts, failure.reason
        if failure.retry_after is None:
            line = "%s %s is dead after attempt %d (%s); redrive or discard it"
            self._lines.log(logging.ERROR, "dead messages", line, *about, fields=fields)
        else:
            line = "%s %s was not sent in attempt %d (%s); it is sent again in %.1f s"
            self._lines.log(
                logging.WARNING, "messages that were not sent", line, *about, failure.retry_after, fields=fields
            )


def _check(order: object, on_dead: object, poll: Any) -> None:
    if not (isinstance(poll, Sequence) and len(poll) == 2):  # noqa: PLR2004  # the shortest and the longest wait
        raise ConfigurationError(f"poll must be two times in seconds, and it is {described(poll)}")
    check_times(poll=poll[0])
    check_numbers(poll[0], poll=poll[1])
    for name, value, allowed in [("order", order, get_args(Order)), ("on_dead", on_dead, get_args(OnDead))]:
        if value not in allowed:
            raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, allowed))}, and it is {word(value)}")


def _check_lease(lease: float, longest_send: float, all_sends: float) -> None:
    if lease <= longest_send:
        raise ConfigurationError(
            f"a send may take {longest_send:g} s, and a lease of {lease:g} s would be over before; "
            "pass a longer lease, or a shorter timeout to the broker"
        )
    if all_sends > lease:
        logger.warning(
            "the sends of one batch may take %g s, which is longer than the lease of %g s: what is not begun then is "
            "claimed again; use a higher concurrency, a smaller batch, or a longer lease",
            all_sends,
            lease,
            extra={"seconds": all_sends},
        )


def _start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task of the relay. What it does belongs neither to a message nor to a trace of who started the relay."""
    return asyncio.create_task(work, context=Context(), name="diator: relay")


def _explained(error: BaseException) -> str:
    """Describe *error* in one line. An error of a database may quote a row behind its first line."""
    if isinstance(error, BrokerError):
        return printable(without_credentials(str(error)))
    name, first = name_of(type(error)), str(error).partition("\n")[0]
    return printable(f"{name}: {without_credentials(first)}" if first else name)


def _state(status: Status, lease_lost: int) -> OutboxState:
    return OutboxState(
        pending=status.pending,
        oldest=status.oldest,
        scheduled=status.scheduled,
        dead=status.dead,
        blocked=status.blocked,
        blocked_keys=status.blocked_keys,
        held_back=status.held_back,
        held_back_for=status.held_back_for,
        lease_lost=lease_lost,
    )
