"""The sending half of the transport: one producer that many callers use at once, with an end to every call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeAlias
from uuid import UUID

from diator.brokers.connecting import ClientConnection
from diator.brokers.kafka._batch import record_size
from diator.brokers.kafka._client import Cluster
from diator.brokers.kafka._errors import CLIENT_ERRORS, NO_RIGHT, TOO_LARGE, refused, send_error
from diator.brokers.kafka._idempotent import IdempotentProducer
from diator.brokers.kafka._topics import TopicPolicy
from diator.brokers.kafka._unconfirmed import Batch, Call, Place, Unconfirmed
from diator.brokers.supervisor import close_all
from diator.exceptions import BrokerClosed, BrokerError, OutcomeUnknown

_BATCH_BYTES = 128 * 1024

_Batch: TypeAlias = Batch[IdempotentProducer]


class Producer(ClientConnection[IdempotentProducer]):
    """
    Sends messages through one idempotent producer of aiokafka, and through another one when that breaks.

    aiokafka repeats a request whose answer was lost, and Kafka recognises the repeat by its number and stores it once.
    Otherwise each lost answer would be a duplicate. In return aiokafka tries forever, so the deadlines are kept here.
    When the oldest call is overdue, the calls whose messages were sent end with `OutcomeUnknown`, and the producer is
    torn down. The next producer sends what this one had not sent, before all later messages.

    After a message that Kafka refused, aiokafka goes on counting, and Kafka refuses what follows. Then too another
    producer takes over, and the refused one ends once all its batches are answered.

    Which call is where is the business of `Unconfirmed`. This class only connects, waits and resolves futures.
    """

    def __init__(self, cluster: Cluster, policy: TopicPolicy, *, max_in_flight: int) -> None:
        super().__init__(cluster.where, timeout=cluster.timeout, reconnect=cluster.reconnect)
        self._cluster = cluster
        self._policy = policy
        self._max_in_flight = max_in_flight
        self._reset()

    def _reset(self) -> None:
        self._calls = Unconfirmed[IdempotentProducer](max_in_flight=self._max_in_flight, batch_bytes=_BATCH_BYTES)
        self._preparing = asyncio.Lock()  # one prepares a producer; callers wait for their turn at `_lock`
        self._handing_over: asyncio.Task[None] | None = None
        self._room = asyncio.Event()  # set when there may be room for another call
        self._idle = asyncio.Event()  # set when no call is unconfirmed
        self._alarm: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Connect now. BrokerUnavailable if that is not possible."""
        self._bind_to_running_loop()
        attempts = self._attempts
        try:
            async with asyncio.timeout(self.timeout), self._lock:
                if self.is_closed:
                    raise BrokerClosed("this broker is closed")
                await self._prepared(attempts)
        except CLIENT_ERRORS as error:
            raise self._not_sent(error, None) from error

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: list[tuple[str, bytes | None]] | None = None,
        partition: int | None = None,
        message_id: UUID | None = None,
    ) -> Awaitable[None]:
        """
        Send *value*. What this returns ends when every replica that is in sync has stored it.

        It raises:
            BrokerUnavailable: It was not handed over.
            MessageRejected: Kafka refused it.
            OutcomeUnknown: It was handed over, and not confirmed in time.
            BrokerClosed: `aclose` was called before.
        """
        loop = self._bind_to_running_loop()
        deadline = loop.time() + self.timeout
        calls, producer, place = self._calls, self._link, None
        if producer is not None and not (self._queued or calls.waiting or calls.is_full or self.is_closed):
            place = producer.place(topic, key, partition, calls.in_flight > 0)
        if place is None or producer is None:
            return self._send_in_turn(topic, key, value, headers, partition, message_id, deadline)
        return self._add(producer, place, key, value, headers, message_id, deadline)

    async def _send_in_turn(  # noqa: PLR0917  # as `_add`
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]] | None,
        partition: int | None,
        message_id: UUID | None,
        deadline: float,
    ) -> None:
        if self.is_closed:
            raise BrokerClosed("this broker is closed", message_id=message_id)
        producer, place = await self._in_turn(topic, key, partition, message_id, deadline)
        await self._add(producer, place, key, value, headers, message_id, deadline)

    def _add(  # noqa: PLR0917  # it is called for each message, and names would cost time
        self,
        producer: IdempotentProducer,
        place: Place,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]] | None,
        message_id: UUID | None,
        deadline: float,
    ) -> asyncio.Future[None]:
        size, confirmed = record_size(key, value, headers), asyncio.get_running_loop().create_future()
        call = Call(place, key, value, headers, size, message_id, deadline, confirmed)
        if (opened := self._calls.add(call, producer)) is not None:
            self._start(opened)
        return confirmed

    async def _in_turn(
        self, topic: str, key: bytes | None, partition: int | None, message_id: UUID | None, deadline: float
    ) -> tuple[IdempotentProducer, Place]:
        """Wait for a producer that knows the partitions of *topic*, and for room."""
        attempts, waited_for = self._attempts, "the sends before it"
        self._queued += 1
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                while not self.is_closed:
                    waited_for = "the partitions of earlier messages"
                    producer = await self._prepared(attempts)
                    if self._calls.is_full:
                        waited_for = f"the confirmation of one of {self._max_in_flight:,} messages in flight"
                        self._room.clear()
                        await self._room.wait()
                        continue
                    place = producer.place(topic, key, partition, self._calls.in_flight > 0)
                    if place is not None:
                        return producer, place
                    waited_for = f"the topic {topic}"
                    await producer.create_missing(self._cluster, self._policy, topic)
                    waited_for = f"the partitions of {topic}"
                    await producer.look_up(topic)
                raise BrokerClosed("this broker is closed")
        except CLIENT_ERRORS as error:
            raise self._not_sent(error, message_id, waited_for) from error
        except BrokerError as error:
            raise send_error(error, message_id, handed_over=False) from error.__cause__
        finally:
            self._queued -= 1

    async def _connect(self) -> IdempotentProducer:
        await self._background.wait()  # the old producer may still send a message of the same key
        return await IdempotentProducer.connect(self._cluster, on_failure=self._give_up)

    async def _prepared(self, attempts: int) -> IdempotentProducer:
        """Return a producer that works, and that has been given all calls that waited for one. See `_connected`."""
        async with self._preparing:
            while True:
                if self._link is not None and self._link.has_ended:
                    self._give_up(self._link, OutcomeUnknown("its sender was cancelled; it may have arrived"))
                producer = await self._connected(attempts)
                for topic in {call.place[0] for call in self._calls.waiting}:
                    if not producer.knows(topic):
                        await self._look_up(producer, topic)
                if producer is self._link and not producer.has_ended:
                    for batch in self._calls.hand_over(producer):
                        self._start(batch)
                    return producer

    async def _look_up(self, producer: IdempotentProducer, topic: str) -> None:
        """Look up the partitions of a topic of calls that wait. If that fails, so do these calls."""
        try:
            await producer.look_up(topic)
        except CLIENT_ERRORS as error:
            self._fail(self._calls.take_waiting(topic), error, handed_over=False)

    def _not_sent(self, error: Exception, message_id: UUID | None, waited_for: str = "") -> BrokerError:
        if isinstance(error, asyncio.TimeoutError) and not str(error):
            if self._link is None:
                error = ConnectionError(self._no_connection())
            elif waited_for:
                error = TimeoutError(f"it waited for {waited_for} for {self.timeout:g} s")
        return send_error(error, message_id, handed_over=False)

    # -- batches, and how they end -----------------------------------------------------------------------------------

    def _start(self, batch: _Batch) -> None:
        batch.producer.send(batch, self._settle)
        self._wake_at(batch.deadline)

    def _settle(self, batch: _Batch, error: BaseException | None) -> None:
        """End the calls of *batch*, or try again with those that Kafka may not have meant."""
        if batch not in self._calls:
            return  # it was withdrawn, or given up
        producer = batch.producer
        if error is None:
            self._confirm(self._calls.end(batch))
        elif producer.has_ended:
            self._give_up(producer, error)
        elif isinstance(error, NO_RIGHT):  # Kafka has not looked at its number
            self._fail(self._calls.end(batch), error, handed_over=True)
        else:
            if len(batch.calls) > 1 and refused(error):
                self._calls.split(batch, is_too_large=isinstance(error, TOO_LARGE))
            else:
                self._fail(self._calls.end(batch), error, handed_over=True)
            self._backoff.reset()
            self._retire(producer)
        self._note_answers(producer)

    def _give_up(self, producer: IdempotentProducer, why: BaseException) -> None:
        """End the calls whose messages *producer* has sent: nobody knows what became of them."""
        self._retire(producer)
        self._fail(self._calls.abandon(producer), why, handed_over=True)
        self._note_answers(producer)

    def _retire(self, producer: IdempotentProducer) -> None:
        """Have another producer send what this one has not sent. It ends when all that it sent is answered."""
        if producer is self._link:
            self._link = None
            producer.retire()
            producer.drop(self._calls.retire(producer))
            self._background.start(self._end(producer), "the end of a producer")
        self._hand_over_soon()

    def _note_answers(self, producer: IdempotentProducer) -> None:
        if producer is not self._link and not self._calls.is_used(producer):
            producer.answered.set()

    async def _end(self, producer: IdempotentProducer) -> None:
        if self._calls.is_used(producer):
            await producer.answered.wait()
        await producer.close()

    def _confirm(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if not call.confirmed.done():  # else its caller has gone
                call.confirmed.set_result(None)
        self._note_room()

    def _fail(self, calls: Sequence[Call], error: BaseException, *, handed_over: bool) -> None:
        for call in calls:
            if not call.confirmed.done():
                own = send_error(error, call.message_id, handed_over=handed_over, place=call.place)
                call.confirmed.set_exception(own)
        self._note_room()

    def _note_room(self) -> None:
        if not self._calls.is_full:
            self._room.set()
        if not self._calls.in_flight:
            self._idle.set()

    # -- calls that wait for the next producer -----------------------------------------------------------------------

    def _hand_over_soon(self) -> None:
        if self._calls.waiting and (self._handing_over is None or self._handing_over.done()):
            self._handing_over = asyncio.create_task(self._hand_over(), name="diator: handing over unsent messages")

    async def _hand_over(self) -> None:
        """Connect for the sake of the calls that wait, so that they end even if nobody else sends."""
        while self._calls.waiting:
            try:
                async with asyncio.timeout(self.timeout):
                    await self._prepared(self._attempts)
            except TimeoutError:
                continue  # the overdue calls have ended
            except CLIENT_ERRORS as error:
                self._fail(self._calls.take_waiting(), error, handed_over=False)

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def _wake_at(self, deadline: float) -> None:
        """Use one timer for all calls instead of one each, for the earliest deadline."""
        if self._alarm is not None and self._alarm.when() > deadline:
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and self._loop is not None:
            self._alarm = self._loop.call_at(deadline, self._end_overdue)

    def _end_overdue(self) -> None:
        self._alarm = None
        now = asyncio.get_running_loop().time()
        for producer in self._calls.stuck(now):
            why = f"within {self.timeout:g} s, the leader did not report that all in-sync replicas have it"
            self._give_up(producer, TimeoutError(why))
        overdue, withdrawn = self._calls.expire(now)  # the partition still has no leader, or no producer connects
        for call in overdue:
            if self._link is None:
                why = self._no_connection()
            elif self._link.has_leader(call.place):
                why = f"its leader took nothing within {self.timeout:g} s"
            else:
                why = f"it had no leader within {self.timeout:g} s"
            self._fail([call], TimeoutError(why), handed_over=False)
        if self._link is not None:
            self._link.drop(withdrawn)
        self._hand_over_soon()
        if (deadline := self._calls.next_deadline()) is not None:
            self._wake_at(deadline)

    # -- closing -----------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        reading = asyncio.create_task(close_all(self.subscriptions))
        async with self._lock:
            pass  # the calls that came before are in a batch now, or have ended
        while self._calls.in_flight:
            self._idle.clear()
            await self._idle.wait()
        if self._handing_over is not None:
            self._handing_over.cancel()  # nothing is left to be handed over
            await asyncio.wait([self._handing_over])
        if self._alarm is not None:
            self._alarm.cancel()
        producer = await self._take_link()
        if producer is not None:
            await producer.close()
        await self._background.wait()
        await reading
