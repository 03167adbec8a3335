"""
A broker inside the process that fails as it is told to: for tests of what a program makes of it.

What can happen to a message is a value: `lost`, `duplicated`, `unavailable`, … A test says which message meets which of
them, in advance and exactly, so that it runs the same way every time. Each says what a real transport would do alike.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Self, TypeVar

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
    """What becomes of a message on its way from the program to the service. For `FaultyMessageBroker.on_send`."""


class DeliveryFault(_Fault):
    """What becomes of a delivery to a consumer. For `FaultyMessageBroker.on_delivery`."""


class _NoFault(SendFault, DeliveryFault):
    pass


no_fault: _NoFault = _NoFault("no_fault")
"""Nothing: for the messages between those that something happens to."""

unavailable: SendFault = SendFault("unavailable")
"""`BrokerUnavailable`: not sent. The service is down, or not to be reached."""

rejected: SendFault = SendFault("rejected")
"""`MessageRejected`: not sent, and it will be refused again. A limit, a full queue, a missing right."""

unroutable: SendFault = SendFault("unroutable")
"""`MessageUnroutable`: it reached nobody. RabbitMQ, or Redis Pub/Sub with `require_receiver`."""

unknown_but_sent: SendFault = SendFault("unknown_but_sent")
"""`OutcomeUnknown`, and it has arrived: the link broke before the answer came. Whoever sends it again repeats it."""

unknown_and_lost: SendFault = SendFault("unknown_and_lost")
"""`OutcomeUnknown`, and it has not arrived: the link broke before the message did. Whoever does not repeat, loses."""

lost: SendFault = SendFault("lost")
"""Confirmed, and gone: nobody was subscribed (Redis Pub/Sub), or the service died and had not stored it."""

duplicated: SendFault = SendFault("duplicated")
"""Confirmed, and there twice, with one id: somebody sent it again after an unknown outcome, as an outbox does."""

reordered: SendFault = SendFault("reordered")
"""Confirmed, and there after the next one: two senders, two partitions, or one that was given back."""

held: SendFault = SendFault("held")
"""Confirmed, and there when the test says so (`FaultyMessageBroker.release`): a queue that lags, a link that stalls."""

crashed: DeliveryFault = DeliveryFault("crashed")
"""
The process dies when the work is done and before the service hears of it: it is delivered again, as the next attempt.

On every transport that delivers at least once. Here the consumer goes on, in the place of the next one.
"""

F = TypeVar("F", bound=_Fault)
M = TypeVar("M")


@dataclass(eq=False)
class _Script(Generic[F, M]):
    """Which faults, in their order, meet those who are wanted."""

    told: str
    wants: Callable[[M], bool]
    steps: Iterator[F]
    left: list[F]
    """What still has to happen."""
    by_chance: bool
    """Then one of them is enough."""

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
    The broker inside the process, with faults that a test scripts.

    A script is a sequence: the first message that it is for meets its first fault, the second the second, and so on;
    then nothing happens any more. Of several scripts, the first that has something for a message decides.

        broker.on_send(unavailable)  # the first message that is sent, whichever it is
        broker.on_send(no_fault, lost, of=UserJoined)  # the second UserJoined
        broker.on_send(duplicated, cycle=True)  # each one
        broker.on_send(lost, no_fault, no_fault, seed=7)  # about every third, and always the same ones
        broker.on_delivery(crashed)  # the first delivery

    A retry that asks for a delay comes at once: a test does not wait.

    Attributes:
        sent: What the program was told is sent, to ask for messages and events.
        deliveries: What was delivered, in its order; `outcome` says how the consumer has settled each.
        dead_letters: What was put aside, and why.
    """

    def __init__(self, *, capacity: int = 10_000) -> None:
        super().__init__(capacity=capacity)
        self.sent: Recorder = Recorder()
        self.deliveries: list[Delivery] = []
        self._send_scripts: list[_Script[SendFault, Message]] = []
        self._delivery_scripts: list[_Script[DeliveryFault, Delivery]] = []
        self._reordered: list[Message] = []
        self._held: list[Message] = []
        self._subscriptions: list[_Reading] = []
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
        Have messages that the program sends meet *faults*.

        Only those *of* an event class, and only those for which *when* holds. With *cycle* the sequence begins again at
        its end; with *seed* each message meets one of the faults by chance.
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
        Have deliveries meet *faults*; which, is said as with `on_send`. Each that comes again is another delivery.

        So `cycle` without a limit would never end: bound it, as by `when=lambda delivery: delivery.attempt < 3`.
        """
        name = None if of is None else name_on_wire(of)

        def wants(delivery: Delivery) -> bool:
            return name in (None, delivery.topic.message_name) and (when is None or when(delivery))

        self._delivery_scripts.append(_script("on_delivery", faults, of, wants, cycle=cycle, seed=seed))

    def verify(self) -> None:
        """AssertionError if something that was scripted has not happened: then the test has proved nothing of it."""
        scripts: Sequence[_Script[Any, Any]] = [*self._send_scripts, *self._delivery_scripts]
        if unused := [f"{', '.join(map(repr, script.left))} of {script.told}" for script in scripts if script.left]:
            raise AssertionError(f"what was scripted has not happened: {'; '.join(unused)}")

    # -- the program's side --------------------------------------------------------------------------------------

    async def send_message(self, message: Message, /) -> None:
        """See `MessageBroker.send_message`: as scripted, else it succeeds."""
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
        """See `ReadableBroker.subscribe`."""
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            reading = _Reading(deliveries, self._meets, self._progress, on_gap)
            self._subscriptions.append(reading)
            self._progress.set()
            try:
                yield reading
            finally:
                self._subscriptions.remove(reading)

    def _meets(self, delivery: Delivery) -> DeliveryFault | None:
        self.deliveries.append(delivery)
        return _step(self._delivery_scripts, delivery)

    # -- the test's side -----------------------------------------------------------------------------------------

    def inject(self, of: type[object] | Topic, body: bytes) -> None:
        """Put *body* where messages of an event class go, whatever it is: what a foreign, or broken, sender leaves."""
        topic = of if isinstance(of, Topic) else Topic(getattr(of, "message_type", ""), name_on_wire(of))
        self._put(topic, body)

    async def release(self) -> None:
        """Let what was `held` arrive, in its order."""
        arrive, self._held = self._held, []
        for message in arrive:
            await super().send_message(message)

    def shuffle(self, *, seed: int) -> None:
        """Put what waits into another order, the same for the same *seed*."""
        chance = random.Random(seed)  # noqa: S311  # repeatable is what it has to be
        for queue in [self._kept, *self._queues]:
            entries = [queue.take() for _ in range(len(queue))]
            chance.shuffle(entries)
            for entry in entries:
                queue.put(entry)

    def gap(self, *, seconds: float = 1.0, reason: str = "scripted") -> None:
        """Tell every subscription that messages may have been missed, as after a lost connection. None is."""
        now = datetime.now(UTC)
        for reading in [*self._subscriptions]:
            if reading.on_gap is not None:
                reading.on_gap(Gap(since=now - timedelta(seconds=seconds), until=now, reason=reason))

    async def drain(self, *consumers: Consumer, within: float = 10.0) -> None:
        """
        Run *consumers* until they have handled all there is, what comes again and what they send included; stop them.

        Nothing is waited for but that: it returns as soon as no message waits and every delivery is settled. A consumer
        runs once; the next `drain` takes new ones, as a program does that starts again.

        Raises:
            TimeoutError: That took longer than *within* seconds, for something is handled for ever, or never.
            Exception: What ends a consumer.
        """
        subscribed = len(self._subscriptions) + len(consumers)
        running = [asyncio.create_task(consumer.run(signals=False)) for consumer in consumers]
        idle = asyncio.create_task(self._until_idle(subscribed))
        try:
            done, _ = await asyncio.wait({idle, *running}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError(f"after {within:g} s {self._waiting} messages wait, and {self._out} are not settled")
        finally:
            if not idle.done():
                idle.cancel()
                for consumer in consumers:
                    consumer.stop()  # and a second time, for what is at work may go on for ever
            for consumer in consumers:
                consumer.stop()
            await asyncio.wait({idle, *running})
        for task in {idle, *running}:
            if not task.cancelled():
                task.result()

    async def _until_idle(self, subscribed: int) -> None:
        while True:
            if len(self._subscriptions) < subscribed or self._waiting or self._out:
                self._progress.clear()
                await self._progress.wait()
            elif self._reordered:
                await self._send_reordered()  # nothing comes that could go before them
            else:
                return

    @property
    def _waiting(self) -> int:
        return sum(map(len, self._queues))

    @property
    def _out(self) -> int:
        return sum(len(reading.unsettled) for reading in self._subscriptions)


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
        raise ValueError(f"{call}() takes faults, and either cycle or seed")
    steps: Iterator[F] = iter(faults)
    if cycle:
        steps = itertools.cycle(faults)
    elif seed is not None:
        chance = random.Random(seed)  # noqa: S311  # repeatable is what it has to be
        steps = (chance.choice(faults) for _ in itertools.count())
    told = f"{call}({', '.join(map(repr, faults))}{f', of={of.__name__}' if of else ''})"
    return _Script(told, wants, steps, [each for each in faults if each is not no_fault], by_chance=seed is not None)


def _step(scripts: Sequence[_Script[F, M]], met: M) -> F | None:
    """Give the fault that the first script has which wants it."""
    return next((step for script in scripts if (step := script.next(met)) is not None), None)


class _Reading:
    """One subscription. No generator: a cancelled wait would end it."""

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
    """Settles, unless the process dies before it could."""

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
