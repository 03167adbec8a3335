"""
An in-memory broker with scripted faults, for tests of how a program reacts to them.

Each fault is a value. A test decides in advance which message meets which fault, so that it runs the same way every
time. A fault with an error makes the send raise it. With any other fault the send succeeds.

Faults of a send, for `FaultyMessageBroker.on_send`:

- `unavailable`: `BrokerUnavailable`, and the message is not sent. The service is down or cannot be reached.
- `rejected`: `MessageRejected`, and the message is not sent. The service refuses it: a full queue, no permission.
- `unroutable`: `MessageUnroutable`, and the message reaches nobody. RabbitMQ with `unroutable="raise"`, or Redis
  Pub/Sub with `require_receiver`.
- `unknown_but_sent`: `OutcomeUnknown`, and the message is sent. The connection broke before the confirmation; sending
  the message again duplicates it.
- `unknown_and_lost`: `OutcomeUnknown`, and the message is not sent. The connection broke before the message arrived; it
  is lost unless it is sent again.
- `lost`: The message is dropped. Nobody was subscribed (Redis Pub/Sub), or the service crashed before storing it.
- `duplicated`: The message is delivered twice, with one id. It was sent again after an unknown outcome.
- `reordered`: The message is delivered after the next one. Two senders, two partitions, or a requeued message.
- `held`: The message is delivered at `FaultyMessageBroker.release`. A queue that lags, a connection that stalls.

A fault of a delivery, for `FaultyMessageBroker.on_delivery`:

- `crashed`: The process crashes after the work and before the acknowledgement: the message is redelivered, as the next
  attempt. This can happen on every transport that delivers at least once. Here the same consumer continues, in place of
  a new one.

`no_fault` works for both: it stands for the messages between the faulty ones.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Self, TypeVar

from diator._text import counted
from diator.brokers.base import Delivery, Gap, OnGap, Settler, Topic
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import Message
from diator.consumer import Consumer
from diator.exceptions import (
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    MessageRejected,
    MessageUnroutable,
    OutcomeUnknown,
)
from diator.testing.recorder import Recorder, name_on_wire

__all__ = [
    "DeliveryFault",
    "FaultyMessageBroker",
    "SendFault",
    "crashed",
    "duplicated",
    "held",
    "lost",
    "no_fault",
    "rejected",
    "reordered",
    "unavailable",
    "unknown_and_lost",
    "unknown_but_sent",
    "unroutable",
]


class _Fault:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


class SendFault(_Fault):
    """A fault of a message on its way from the program to the service. For `FaultyMessageBroker.on_send`."""


class DeliveryFault(_Fault):
    """A fault of a delivery to a consumer. For `FaultyMessageBroker.on_delivery`."""


class _NoFault(SendFault, DeliveryFault):
    pass


no_fault: _NoFault = _NoFault("no_fault")

unavailable: SendFault = SendFault("unavailable")
rejected: SendFault = SendFault("rejected")
unroutable: SendFault = SendFault("unroutable")
unknown_but_sent: SendFault = SendFault("unknown_but_sent")
unknown_and_lost: SendFault = SendFault("unknown_and_lost")
lost: SendFault = SendFault("lost")
duplicated: SendFault = SendFault("duplicated")
reordered: SendFault = SendFault("reordered")
held: SendFault = SendFault("held")

crashed: DeliveryFault = DeliveryFault("crashed")

F = TypeVar("F", bound=_Fault)
M = TypeVar("M")


@dataclass(eq=False)
class _Script(Generic[F, M]):
    """
    A sequence of faults, and which messages or deliveries meet them.

    Attributes:
        text: The call that made the script, for error messages.
        wants: Whether the script is for a message or delivery.
        steps: The faults, in order.
        left: The faults that still have to happen.
        by_chance: Whether the faults are drawn at random; then one of them is enough.
    """

    text: str
    wants: Callable[[M], bool]
    steps: Iterator[F]
    left: list[F]
    by_chance: bool

    def next(self, met: M) -> F | None:
        step = next(self.steps, None) if self.wants(met) else None
        if step is not None and step in self.left:
            if self.by_chance:
                self.left.clear()
            else:
                self.left.remove(step)
        return step


class FaultyMessageBroker(MemoryMessageBroker):
    """
    An in-memory broker with faults that a test scripts.

    A script is a sequence of faults: the first matching message meets the first fault, the second message the second
    fault, and so on. After the last fault, nothing happens any more. If several scripts match a message, the first
    script that has a fault left decides.

        broker.on_send(unavailable)  # the first message that is sent
        broker.on_send(no_fault, lost, of=UserJoined)  # the second UserJoined
        broker.on_send(duplicated, cycle=True)  # every message
        broker.on_send(lost, no_fault, no_fault, seed=7)  # about every third message, the same ones in each run
        broker.on_delivery(crashed)  # the first delivery

    A retry with a delay is redelivered at once, so that a test does not wait.

    Attributes:
        sent: A recorder of the messages whose send succeeded.
        deliveries: The deliveries, in order. `Delivery.outcome` is how the consumer settled each one.
        dead_letters: The dead letters, with their reasons.
    """

    def __init__(self, *, capacity: int = 10_000) -> None:
        super().__init__(capacity=capacity)
        self.sent: Recorder = Recorder()
        self.deliveries: list[Delivery] = []
        self._send_scripts: list[_Script[SendFault, Message]] = []
        self._delivery_scripts: list[_Script[DeliveryFault, Delivery]] = []
        self._reordered: list[Message] = []
        self._held: list[Message] = []
        self._readings: list[_Reading] = []
        self._progress = asyncio.Event()

    # -- the script ----------------------------------------------------------------------------------------------

    def on_send(
        self,
        *faults: SendFault,
        of: type[object] | None = None,
        when: Callable[[Message], bool] | None = None,
        cycle: bool = False,
        seed: int | None = None,
    ) -> None:
        """
        Script *faults* for the messages that the program sends.

        *of* limits the script to an event class, *when* to messages for which it returns true. With *cycle*, the
        sequence starts again after its last fault. With *seed*, each message meets one of the faults at random.

        Raises:
            ValueError: No fault is passed, or both *cycle* and *seed*.
            TypeError: *of* is not an integration event.
        """
        name = None if of is None else name_on_wire(of)

        def wants(message: Message) -> bool:
            return name in (None, message.message_name) and (when is None or when(message))

        self._send_scripts.append(_script("on_send", faults, of, wants, cycle=cycle, seed=seed))

    def on_delivery(
        self,
        *faults: DeliveryFault,
        of: type[object] | None = None,
        when: Callable[[Delivery], bool] | None = None,
        cycle: bool = False,
        seed: int | None = None,
    ) -> None:
        """
        Script *faults* for deliveries, with the options of `on_send`. Each redelivery is another delivery.

        Therefore a *cycle* of crashes would never end. Bound it, as with `when=lambda delivery: delivery.attempt < 3`.

        Raises:
            ValueError: No fault is passed, or both *cycle* and *seed*.
            TypeError: *of* is not an integration event.
        """
        name = None if of is None else name_on_wire(of)

        def wants(delivery: Delivery) -> bool:
            return name in (None, delivery.topic.message_name) and (when is None or when(delivery))

        self._delivery_scripts.append(_script("on_delivery", faults, of, wants, cycle=cycle, seed=seed))

    def verify(self) -> None:
        """Raise AssertionError if a scripted fault has not happened: the test would prove nothing about it."""
        scripts: Sequence[_Script[Any, Any]] = [*self._send_scripts, *self._delivery_scripts]
        if unused := [f"{', '.join(map(repr, script.left))} of {script.text}" for script in scripts if script.left]:
            raise AssertionError(f"scripted faults have not happened: {'; '.join(unused)}")

    # -- the program's side --------------------------------------------------------------------------------------

    async def send_message(self, message: Message, /) -> None:
        """Send *message* with its scripted fault; see `MessageBroker.send_message`. Without a fault it succeeds."""
        if self._closed:
            raise BrokerClosed("this broker is closed", message_id=message.message_id)
        fault = _step(self._send_scripts, message)
        if fault in _NOT_SENT:
            raise _NOT_SENT[fault](f"{fault}, as scripted", message_id=message.message_id)
        if fault is held:
            self._held.append(message)
        elif fault is reordered:
            self._reordered.append(message)
        elif fault is not lost:
            for _ in range(2 if fault is duplicated else 1):
                await super().send_message(message)
            await self._send_reordered()
        if fault is unknown_but_sent:
            raise OutcomeUnknown(f"{fault}, as scripted", message_id=message.message_id)
        await self.sent.send_message(message)

    async def _send_reordered(self) -> None:
        follow, self._reordered = self._reordered, []
        for message in follow:
            await super().send_message(message)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, prefetch: int = 64, on_gap: OnGap | None = None
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """Subscribe; see `ReadableBroker.subscribe`."""
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            reading = _Reading(deliveries, self._meets, self._progress, on_gap)
            self._readings.append(reading)
            self._progress.set()
            try:
                yield reading
            finally:
                with suppress(ValueError):  # its event loop has ended before it
                    self._readings.remove(reading)

    def _bind_to_running_loop(self) -> None:
        earlier = self._loop
        super()._bind_to_running_loop()
        if self._loop is not earlier:
            self._progress = asyncio.Event()
            self._readings.clear()

    def _meets(self, delivery: Delivery) -> DeliveryFault | None:
        self.deliveries.append(delivery)
        return _step(self._delivery_scripts, delivery)

    # -- the test's side -----------------------------------------------------------------------------------------

    def inject(self, of: type[object] | Topic, body: bytes) -> None:
        """Queue *body*, whatever it contains, as a message of an event class or topic, as a broken sender would."""
        topic = of if isinstance(of, Topic) else Topic(getattr(of, "message_type", ""), name_on_wire(of))
        self._put(topic, body)

    async def release(self) -> None:
        """Deliver the messages that were `held`, in order."""
        arrive, self._held = self._held, []
        for message in arrive:
            await super().send_message(message)

    def shuffle(self, *, seed: int) -> None:
        """Shuffle the waiting messages. The same *seed* results in the same order."""
        chance = random.Random(seed)  # noqa: S311  # a test has to be repeatable
        for queue in [self._kept, *self._queues]:
            entries = [queue.take() for _ in range(len(queue))]
            chance.shuffle(entries)
            for entry in entries:
                queue.put(entry)

    def gap(self, *, seconds: float = 1.0, reason: str = "scripted") -> None:
        """Report a gap to every subscription, as after a lost connection. No message is lost."""
        now = datetime.now(UTC)
        for reading in [*self._readings]:
            if reading.on_gap is not None:
                reading.on_gap(Gap(since=now - timedelta(seconds=seconds), until=now, reason=reason))

    async def drain(self, *consumers: Consumer, within: float = 10.0) -> None:
        """
        Run *consumers* until every message is handled, including redeliveries and messages that they send. Stop them.

        Return as soon as no message waits and every delivery is settled. A consumer runs only once, so the next `drain`
        needs new consumers, as after a restart of the program.

        Raises:
            TimeoutError: Messages are still waiting or unsettled after *within* seconds.
            Exception: The error of a consumer that ended.
        """
        self._bind_to_running_loop()
        subscribed = len(self._readings) + len(consumers)
        running = [asyncio.create_task(consumer.run(signals=False)) for consumer in consumers]
        idle = asyncio.create_task(self._until_idle(subscribed))
        try:
            done, _ = await asyncio.wait({idle, *running}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                waiting = counted(self._waiting, "message is waiting", "messages are waiting")
                unsettled = counted(self._unsettled, "is not settled", "are not settled")
                raise TimeoutError(f"after {within:g} s, {waiting} and {unsettled}")
        finally:
            if not idle.done():
                idle.cancel()
                for consumer in consumers:
                    consumer.stop()  # the second stop below cancels handlers that never end
            for consumer in consumers:
                consumer.stop()
            await asyncio.wait({idle, *running})
        for task in {idle, *running}:
            if not task.cancelled():
                task.result()

    async def _until_idle(self, subscribed: int) -> None:
        while True:
            if len(self._readings) < subscribed or self._waiting or self._unsettled:
                self._progress.clear()
                await self._progress.wait()
            elif self._reordered:
                await self._send_reordered()  # no later message will come
            else:
                return

    @property
    def _waiting(self) -> int:
        return sum(map(len, self._queues))

    @property
    def _unsettled(self) -> int:
        return sum(len(reading.unsettled) for reading in self._readings)


_NOT_SENT: dict[SendFault | None, type[BrokerError]] = {
    unavailable: BrokerUnavailable,
    rejected: MessageRejected,
    unroutable: MessageUnroutable,
    unknown_and_lost: OutcomeUnknown,
}


def _script(
    call: str,
    faults: tuple[F, ...],
    of: type[object] | None,
    wants: Callable[[M], bool],
    *,
    cycle: bool,
    seed: int | None,
) -> _Script[F, M]:
    if not faults or (cycle and seed is not None):
        raise ValueError(f"{call}() needs at least one fault, and either cycle or seed")
    steps: Iterator[F] = iter(faults)
    if cycle:
        steps = itertools.cycle(faults)
    elif seed is not None:
        chance = random.Random(seed)  # noqa: S311  # a test has to be repeatable
        steps = (chance.choice(faults) for _ in itertools.count())
    text = f"{call}({', '.join(map(repr, faults))}{f', of={of.__name__}' if of else ''})"
    return _Script(text, wants, steps, [each for each in faults if each is not no_fault], by_chance=seed is not None)


def _step(scripts: Sequence[_Script[F, M]], met: M) -> F | None:
    """Return the fault of the first script that has one for *met*."""
    return next((step for script in scripts if (step := script.next(met)) is not None), None)


class _Reading:
    """One subscription. It is not a generator, because a cancelled wait would end a generator."""

    def __init__(
        self,
        deliveries: AsyncIterator[Delivery],
        meets: Callable[[Delivery], DeliveryFault | None],
        progress: asyncio.Event,
        on_gap: OnGap | None,
    ) -> None:
        self._deliveries = deliveries
        self._meets = meets
        self._progress = progress
        self.on_gap = on_gap
        self.unsettled: set[Delivery] = set()
        inner: Any = deliveries  # of the in-memory broker, which has these methods
        self.make_room: Callable[[int], None] = inner.make_room
        self.postpone: Callable[[Delivery], None] = inner.postpone
        self.resume: Callable[[Delivery], bool] = inner.resume

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        delivery = await anext(self._deliveries)
        delivery.settler = _Settling(self, delivery.settler, crashes=self._meets(delivery) is crashed)
        self.unsettled.add(delivery)
        return delivery

    def settled(self, delivery: Delivery) -> None:
        self.unsettled.discard(delivery)
        self._progress.set()


class _Settling:
    """Settles a delivery, unless the process is scripted to crash before that."""

    def __init__(self, reading: _Reading, settler: Settler, *, crashes: bool) -> None:
        self._reading = reading
        self._settler = settler
        self._crashes = crashes

    async def ack(self, delivery: Delivery, /) -> None:
        await (self._settler.retry(delivery, 0.0) if self._crashes else self._settler.ack(delivery))
        self._reading.settled(delivery)

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        await self._settler.retry(delivery, 0.0)
        self._reading.settled(delivery)

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        await (self._settler.retry(delivery, 0.0) if self._crashes else self._settler.dead_letter(delivery, reason))
        self._reading.settled(delivery)
