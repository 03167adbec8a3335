"""
Transports with exactly one defect each: the proof that the conformance suite would find it.

Each is the broker inside the process with something done wrong, and names the scenarios that have to fail for it. The
tests of diator run them all; whoever adds a scenario adds the transport that it is there to catch.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import socket
import time
import unicodedata
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar
from uuid import UUID, uuid4

from diator._handling import Handled
from diator.brokers.base import Delivery, OnGap, ReadableBroker, Settler, Topic
from diator.brokers.capabilities import Capabilities
from diator.brokers.codec import decode, encode
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import Message
from diator.consumer import Consumer, Health
from diator.exceptions import BrokerError, BrokerUnavailable, DiatorError, MessageTooLarge
from diator.retrying import RetryPolicy

logger: logging.Logger = logging.getLogger("diator.testing.saboteurs")

S = TypeVar("S", bound="type[Saboteur]")

SABOTEURS: list[type[Saboteur]] = []
"""All of them, in the order in which they stand here."""

_FOREVER = 3600.0


class Saboteur(MemoryMessageBroker):
    """The broker inside the process, with places where a subclass puts its defect. This one has none."""

    caught_by: ClassVar[tuple[str, ...]] = ()
    """The ids of the scenarios that fail for it."""
    consumer: ClassVar[type[Consumer]] = Consumer
    """What runs above it: a defect of the consumer is put here."""

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        """See `ReadableBroker.subscribe`."""
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield _Reading(deliveries, self.read)

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        """Give the next delivery."""
        return self.settled_by(await anext(deliveries))

    def settled_by(self, delivery: Delivery) -> Delivery:
        """Have this broker's `ack`, `retry` and `dead_letter` settle *delivery*."""
        delivery.settler = _Settling(self, delivery)
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        """Acknowledge."""
        await settle.ack(delivery)

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        """Give back."""
        await settle.retry(delivery, after)

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        """Put aside."""
        await settle.dead_letter(delivery, reason)


class _Reading:
    """An iterator that reads as its broker does."""

    def __init__(self, deliveries: AsyncIterator[Delivery], read: Callable[[AsyncIterator[Delivery]], Any]) -> None:
        self._deliveries = deliveries
        self._read = read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        delivery: Delivery = await self._read(self._deliveries)
        return delivery


class _Settling:
    """Settles the delivery that the broker inside gave, whatever was made of it."""

    def __init__(self, broker: Saboteur, delivery: Delivery) -> None:
        self._broker = broker
        self._inner = delivery.settler
        self._delivery = delivery

    async def ack(self, _: Delivery, /) -> None:
        await self._broker.ack(self._inner, self._delivery)

    async def retry(self, _: Delivery, after: float, /) -> None:
        await self._broker.retry(self._inner, self._delivery, after)

    async def dead_letter(self, _: Delivery, reason: str, /) -> None:
        await self._broker.dead_letter(self._inner, self._delivery, reason)


def _caught_by(*ids: str) -> Callable[[S], S]:
    def register(saboteur: S) -> S:
        saboteur.caught_by = ids
        SABOTEURS.append(saboteur)
        return saboteur

    return register


def _again(delivery: Delivery, **changes: Any) -> Delivery:
    """Make another delivery of the same message."""
    values = {name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler", "token")}
    return Delivery(**{**values, **changes})


# -- sending -----------------------------------------------------------------------------------------------------


@_caught_by("PUB-01")
class LosesEveryTenth(Saboteur):
    """Confirms every tenth message and forgets it."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10:
            await super().send_message(message)


@_caught_by("PUB-01")
class RepeatsEveryTenth(Saboteur):
    """Sends every tenth message twice."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        await super().send_message(message)
        if self._count % 10 == 0:
            await super().send_message(message)


@_caught_by("PUB-01")
class Invents(Saboteur):
    """Sends a message of its own now and then."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10 == 0:
            await super().send_message(replace(message, message_id=uuid4()))
        await super().send_message(message)


@_caught_by("PUB-14")
class DropsRepeats(Saboteur):
    """Takes a repeat for a mistake."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: set[UUID] = set()

    async def send_message(self, message: Message, /) -> None:
        if message.message_id not in self._seen:
            self._seen.add(message.message_id)
            await super().send_message(message)


@_caught_by("PUB-01")
class MakesUpIds(Saboteur):
    """Gives each message an id of its own."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(replace(message, message_id=uuid4()))


@_caught_by("PUB-15")
class WritesIntoTheMessage(Saboteur):
    """Adds a header to the program's own message."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        if isinstance(message.headers, dict):
            message.headers["sent-by"] = "saboteur"


@_caught_by("PUB-09")
class EncodesLate(Saboteur):
    """Keeps the program's own message, and writes it when it is delivered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._messages: dict[UUID, Message] = {}

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._messages[message.message_id] = message

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        with suppress(ValueError):
            message = self._messages[decode(delivery.body).message_id]
            delivery.body = encode(message, headers_in_body=True)
        return delivery


@_caught_by("PUB-05", "SIZ-03", "PUB-18")
class SwallowsErrors(Saboteur):
    """Confirms what it could not send."""

    async def send_message(self, message: Message, /) -> None:
        with suppress(BrokerError):
            await super().send_message(message)


@_caught_by("PUB-05", "FLW-05")
class DropsTheOldest(Saboteur):
    """Makes room by forgetting."""

    async def send_message(self, message: Message, /) -> None:
        for queue in self._queues:
            while len(queue) >= self._capacity:
                queue._waiting.popleft()  # noqa: SLF001
        await super().send_message(message)


@_caught_by("API-01", "PUB-10", "SIZ-03")
class RaisesForeignErrors(Saboteur):
    """Lets out what its client library raises."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except BrokerError as error:
            raise OSError(str(error)) from error


@_caught_by("PUB-10")
class ForgetsWhichMessage(Saboteur):
    """Raises the right error, and does not say for which message."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except BrokerError as error:
            error.message_id = None
            raise


@_caught_by("PUB-13")
class SendsBeforeChecking(Saboteur):
    """Sends what it can of a message that cannot be written."""

    async def send_message(self, message: Message, /) -> None:
        try:
            await super().send_message(message)
        except ValueError as error:
            with suppress(ValueError):
                await super().send_message(replace(message, headers={}, key=None))
            raise error from None


@_caught_by("PUB-18", "PUB-07")
class FailsTogether(Saboteur):
    """Fails every waiting caller when one of them is refused, or many wait."""

    _waiting = 0
    _failed = False

    async def send_message(self, message: Message, /) -> None:
        self._waiting += 1
        try:
            await asyncio.sleep(0)
            if self._failed or self._waiting > 45:  # noqa: PLR2004
                raise BrokerUnavailable("somebody else's error", message_id=message.message_id)
            await super().send_message(message)
        except MessageTooLarge:
            self._failed = True
            raise
        finally:
            self._waiting -= 1
            self._failed = self._failed and self._waiting > 0


@_caught_by("PUB-08")
class SwallowsCancellation(Saboteur):
    """Goes on with a send that was cancelled."""

    async def send_message(self, message: Message, /) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)
        await super().send_message(message)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(_FOREVER if asyncio.current_task().cancelling() else 0)  # type: ignore[union-attr]


@_caught_by("API-06")
class IgnoresCancellation(Saboteur):
    """Returns from a cancelled call as if nothing had been said."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)


@_caught_by("PUB-16", "GRP-11")
class WaitsForReaders(Saboteur):
    """Returns from sending when somebody has taken it."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        while any(len(queue) > 1 for queue in self._queues):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@_caught_by("PUB-17")
class WorksOnlyInItsBlock(Saboteur):
    """Has to be entered first."""

    _entered = False

    async def send_message(self, message: Message, /) -> None:
        if not self._entered:
            raise BrokerUnavailable("not connected", message_id=message.message_id)
        await super().send_message(message)

    async def __aenter__(self) -> Self:
        self._entered = True
        return self


# -- what is in a message ----------------------------------------------------------------------------------------


class _Rewrites(Saboteur):
    async def send_message(self, message: Message, /) -> None:
        await super().send_message(self.rewritten(message))

    def rewritten(self, message: Message) -> Message:
        raise NotImplementedError


@_caught_by("HDR-01", "HDR-06", "SIZ-04", "ENC-08")
class DropsHeaders(_Rewrites):
    """Sends no headers."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={})


@_caught_by("HDR-02")
class SpeaksAscii(_Rewrites):
    """Sends the headers that are ASCII."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={k: v for k, v in message.headers.items() if k.isascii() and v.isascii()})


@_caught_by("HDR-02")
class FoldsHeaders(_Rewrites):
    """Takes names of headers for the same if they differ in case."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={name.lower(): value for name, value in message.headers.items()})


@_caught_by("HDR-01", "HDR-06")
class AddsHeaders(_Rewrites):
    """Adds a trace that nobody began."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={"traceparent": "00-0-0-00", **message.headers})


@_caught_by("SIZ-04")
class LimitsHeaders(_Rewrites):
    """Sends the first 64 headers."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers=dict([*message.headers.items()][:64]))


@_caught_by("HDR-07")
class SplitsHeaders(_Rewrites):
    """Ends a header at the end of the line."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={k: v.split("\n")[0].split("\0")[0] for k, v in message.headers.items()})


@_caught_by("HDR-03")
class TakesHeadersForFields(Saboteur):
    """Reads the name of a message from a header."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        envelope = _json(delivery.body)
        if isinstance(envelope.get("headers"), dict) and (name := envelope["headers"].get("message_name")):
            delivery.body = json.dumps({**envelope, "message_name": name}).encode()
        return delivery


@_caught_by("HDR-11", "ENC-08")
class DropsKeys(_Rewrites):
    """Orders by the key and does not send it."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, key=None)


@_caught_by("ENC-02")
class SkipsEmpty(Saboteur):
    """Takes an empty payload for no message."""

    async def send_message(self, message: Message, /) -> None:
        if message.payload_json != b"{}":
            await super().send_message(message)


@_caught_by("ENC-03")
class Normalises(_Rewrites):
    """Composes characters."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=unicodedata.normalize("NFC", message.payload_json.decode()).encode())


@_caught_by("ENC-04")
class WritesAnew(_Rewrites):
    """Reads the payload and writes it again."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=json.dumps(json.loads(message.payload_json)).encode())


@_caught_by("ENC-01")
class SpeaksC(_Rewrites):
    """Ends text at a NUL."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=message.payload_json.replace(rb"\u0000", b""))


@_caught_by("ENC-07")
class HasItsOwnEnvelope(Saboteur):
    """Writes the parts of a message in another order."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        if envelope := _json(delivery.body):
            delivery.body = json.dumps({"payload": None, **envelope}, separators=(",", ":")).encode()
        return delivery


def _json(body: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value: object = json.loads(body)
        if isinstance(value, dict):
            return value
    return {}


@_caught_by("SIZ-01")
class Truncates(Saboteur):
    """Cuts what does not fit into its buffer."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        delivery.body = delivery.body[:65_536]
        return delivery


@_caught_by("SIZ-02")
class AllowsLessThanPromised(Saboteur):
    """Takes one byte less than it says."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, max_message_bytes=self._max_message_bytes + 1)


@_caught_by("SIZ-03")
class AllowsMoreThanPromised(Saboteur):
    """Takes more than it says."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, max_message_bytes=self._max_message_bytes - 100)


@_caught_by("SIZ-05", "FLW-09", "SUB-06")
class StandsStillForLargeOnes(Saboteur):
    """Lets a large message, or many, hold up everything else."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        if len(delivery.body) > 100_000 or sum(map(len, self._queues)) > 15:  # noqa: PLR2004
            await asyncio.sleep(1)
        return delivery


# -- who gets what -----------------------------------------------------------------------------------------------


class _Misroutes(Saboteur):
    async def send_message(self, message: Message, /) -> None:
        sent = Topic(message.message_type, message.message_name)
        for queue in self._queues:
            if any(self.also(topic, sent) for topic in queue.topics) and sent not in queue.topics:
                queue.topics.add(sent)
        await super().send_message(message)

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        raise NotImplementedError


@_caught_by("ISO-02", "ENC-06")
class MatchesPrefixes(_Misroutes):
    """Takes a name for a prefix."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.startswith(subscribed.message_name)


@_caught_by("ISO-02")
class FoldsNames(_Misroutes):
    """Takes names for the same if they differ in case."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name.lower() == subscribed.message_name.lower()


@_caught_by("ENC-06")
class SqueezesNames(_Misroutes):
    """Replaces what it does not like in a name."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return re.sub(r"\W", "_", sent.message_name) == re.sub(r"\W", "_", subscribed.message_name)


@_caught_by("SUB-14")
class IgnoresTheKind(_Misroutes):
    """Routes by name alone."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return sent.message_name == subscribed.message_name


@_caught_by("ISO-01", "ISO-08", "ISO-02")
class Mixes(_Misroutes):
    """Gives everything to everybody."""

    def also(self, subscribed: Topic, sent: Topic) -> bool:
        return True


class _Subscribes(Saboteur):
    """A subscription other than the one that was asked for."""

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 64,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        asked = self.instead(topics, group, prefetch)
        async with super().subscribe(asked[0], group=asked[1], prefetch=asked[2], on_gap=on_gap) as deliveries:
            yield deliveries

    def instead(
        self, topics: Collection[Topic], group: str | None, prefetch: int
    ) -> tuple[Collection[Topic], str | None, int]:
        raise NotImplementedError


@_caught_by("GRP-02", "GRP-03", "GRP-04")
class BroadcastsToGroups(_Subscribes):
    """Gives every message to each member of a group."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, None, prefetch


@_caught_by("GRP-01", "SUB-04")
class SharesWithoutAGroup(_Subscribes):
    """Has those who named no group share."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group or f"nobody's {sorted(topics)}", prefetch


@_caught_by("GRP-09")
class FoldsGroups(_Subscribes):
    """Takes groups for the same if they differ in case."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and group.lower(), prefetch


@_caught_by("GRP-03", "ACK-23")
class HasOneGroup(_Subscribes):
    """Knows that there is a group, and not which."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group and f"the group {sorted(topics)}", prefetch


@_caught_by("SUB-12", "GRP-16", "UNR-04")
class ListensToOneTopic(_Subscribes):
    """Subscribes to the first topic."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return [*topics][:1], group, prefetch


@_caught_by("SUB-12")
class LabelsWithOneTopic(Saboteur):
    """Says the same topic for every delivery."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        delivery.topic = min(
            topic for queue in self._queues if delivery.topic in queue.topics for topic in queue.topics
        )
        return delivery


@_caught_by("FLW-02")
class IgnoresPrefetch(_Subscribes):
    """Gives out whatever there is."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1_000


@_caught_by("FLW-02")
class CountsFromZero(_Subscribes):
    """Gives out one too many."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, prefetch + 1


@_caught_by("FLW-01")
class GivesOneAtATime(_Subscribes):
    """Never gives out a second delivery before the first is settled."""

    def instead(self, topics: Collection[Topic], group: str | None, prefetch: int) -> Any:
        return topics, group, 1


class _HasOneWindow(Saboteur):
    """Has two deliveries out at once, among all subscriptions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._room = asyncio.Semaphore(self.window)

    window: ClassVar[int] = 2

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        await self._room.acquire()
        try:
            return await super().read(deliveries)
        except BaseException:
            self._room.release()
            raise

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._room.release()
        await super().ack(settle, delivery)


@_caught_by("FLW-16")
class SharesPrefetch(_HasOneWindow):
    """Has one prefetch for all subscriptions."""


@_caught_by("FLW-04")
class GetsStuckWhenFull(_HasOneWindow):
    """Gives out ten, and forgets to make room for every second one that is settled."""

    window = 10
    _count = 0

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._count += 1
        if self._count % 2:
            await super().ack(settle, delivery)
        else:
            await settle.ack(delivery)


@_caught_by("GRP-04")
class Starves(Saboteur):
    """Gives everything to the member that came first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._firsts: dict[int, object] = {}

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        queue = id(deliveries._queue)  # type: ignore[attr-defined]  # noqa: SLF001
        if self._firsts.setdefault(queue, deliveries) is not deliveries:
            await asyncio.Event().wait()
        return await super().read(deliveries)


@_caught_by("GRP-10")
class ForgetsSpareMembers(Starves):
    """Keeps a member asleep although the one that worked has left."""


# -- order -------------------------------------------------------------------------------------------------------


@_caught_by("ORD-01", "ORD-02", "ORD-07", "ORD-09")
class SwapsNeighbours(Saboteur):
    """Lets every tenth message be overtaken by the next."""

    _count = 0
    _held: Message | None = None

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count % 10 == 0 and self._held is None:
            self._held = message
            return
        await super().send_message(message)
        if held := self._held:
            self._held = None
            await super().send_message(held)


@_caught_by("ORD-02")
class SwapsKeys(Saboteur):
    """Keeps the order of each key and not that of the topic."""

    _count = 0
    _held: Message | None = None

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if message.key is not None and self._count % 10 == 0 and self._held is None:
            self._held = message
            return
        if (held := self._held) and held.key == message.key:
            self._held = None
            await super().send_message(held)
        await super().send_message(message)
        if held := self._held:
            self._held = None
            await super().send_message(held)


@_caught_by("ORD-03")
class HidesKeys(DropsKeys):
    """Leaves the consumer no way to keep an order."""


@_caught_by("ORD-10")
class DisordersOnRetry(Saboteur):
    """Turns the queue around when something is given back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        for queue in self._queues:
            queue._waiting.reverse()  # noqa: SLF001
        await super().retry(settle, delivery, after)


# -- settling ----------------------------------------------------------------------------------------------------


@_caught_by("ACK-05", "ACK-14", "ACK-18", "ACK-24")
class AcksOnArrival(Saboteur):
    """Acknowledges what it gives out."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        await self.ack(delivery.settler._inner, delivery)  # type: ignore[attr-defined]  # noqa: SLF001
        return delivery


@_caught_by("ACK-01", "ACK-06", "ACK-21")
class LosesAcks(Saboteur):
    """Takes note of every second acknowledgement."""

    _count = 0

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._count += 1
        if self._count % 2:
            await super().ack(settle, delivery)


@_caught_by("ACK-08")
class AcksAllBefore(Saboteur):
    """Takes an acknowledgement for one of everything before it too."""

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        unsettled: dict[Delivery, Any] = settle._unsettled  # type: ignore[attr-defined]  # noqa: SLF001
        for each in [*unsettled]:
            await super().ack(settle, each)
            if each is delivery:
                break


@_caught_by("ACK-03", "ACK-04", "ACK-10", "ACK-19", "PSN-04")
class TakesRetryForAck(Saboteur):
    """Acknowledges what is given back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)


@_caught_by("ACK-03", "ACK-19")
class RetriesTwice(Saboteur):
    """Puts two copies back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@_caught_by("HDR-04", "ACK-03")
class RetriesWithANewId(Saboteur):
    """Sends it anew instead of giving it back."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.ack(delivery)
        await self.send_message(replace(decode(delivery.body), message_id=uuid4()))


@_caught_by("ACK-11")
class IgnoresTheDelay(Saboteur):
    """Gives back at once."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await settle.retry(delivery, 0)


@_caught_by("ACK-11", "PSN-09")
class WaitsWithTheDelay(Saboteur):
    """Holds everything up until the delay is over."""

    _until = 0.0

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        self._until = time.monotonic() + after
        await settle.retry(delivery, after)

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        await asyncio.sleep(max(0.0, self._until - time.monotonic()))
        return delivery


@_caught_by("ACK-15")
class GivesUpAfterTwenty(Saboteur):
    """Drops what comes for the twentieth time."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await (settle.ack(delivery) if delivery.attempt >= 20 else settle.retry(delivery, after))  # noqa: PLR2004


@_caught_by("FLW-14", "FLW-15")
class CountsWhatWasGivenBack(Saboteur):
    """Makes room only for what was acknowledged."""

    async def retry(self, settle: Settler, delivery: Delivery, after: float) -> None:
        await super().retry(settle, delivery, after)
        settle._unsettled[_again(delivery)] = None  # type: ignore[attr-defined]  # noqa: SLF001
        settle.leave = lambda: None  # type: ignore[attr-defined]

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        settle._unsettled[_again(delivery)] = None  # type: ignore[attr-defined]  # noqa: SLF001
        settle.leave = lambda: None  # type: ignore[attr-defined]


@_caught_by("ACK-10", "ACK-24", "PSN-04")
class CountsNoAttempts(Saboteur):
    """Says that each attempt is the first."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        delivery.attempt = 1
        return delivery


@_caught_by("SUB-07", "ACK-10")
class CountsAttemptsFromZero(Saboteur):
    """Says 0 for the first attempt."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        delivery.attempt -= 1
        return delivery


@_caught_by("ACK-09", "PSN-06")
class ForgetsDeadLetters(Saboteur):
    """Acknowledges what is to be put aside."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await settle.ack(delivery)


@_caught_by("ACK-09", "ACK-20")
class DeliversDeadLetters(Saboteur):
    """Puts aside, and gives back."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        with suppress(BrokerError, ValueError):
            await self.send_message(decode(delivery.body))


@_caught_by("PSN-06")
class SpoilsDeadLetters(Saboteur):
    """Puts aside what is left of a message when it was read as text."""

    async def dead_letter(self, settle: Settler, delivery: Delivery, reason: str) -> None:
        await super().dead_letter(settle, delivery, reason)
        letter = self._dead_letters.pop()
        self._dead_letters.append(replace(letter, body=letter.body.decode(errors="replace").encode()))


@_caught_by("ACK-22")
class RefusesToAckTwice(Saboteur):
    """Has a delivery that cannot be acknowledged twice."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        return _Touchy(**{name: getattr(delivery, name) for name in ("topic", "body", "headers", "attempt", "settler")})


class _Touchy(Delivery):
    async def ack(self) -> None:
        if self.outcome:
            raise OSError("it is acknowledged")
        await super().ack()


# -- subscriptions -----------------------------------------------------------------------------------------------


@_caught_by("SUB-01")
class IsReadyLater(Saboteur):
    """Subscribes when it is first read from."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        later = topics if options.get("group") else []
        async with super().subscribe(later, **options) as deliveries:
            queue = deliveries._deliveries._queue  # type: ignore[attr-defined]  # noqa: SLF001

            async def read(_: object) -> Delivery:
                queue.topics |= set(topics)
                return await anext(deliveries)

            yield _Reading(deliveries, read)


@_caught_by("PUB-02", "GRP-08", "ACK-05", "GRP-09")
class ForgetsGroups(Saboteur):
    """Ends a group with its last member."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, *, group: str | None = None, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, group=group, **options) as deliveries:
            yield deliveries
        if group is not None and (queue := self._groups.pop(group, None)):
            self._queues.remove(queue)


@_caught_by("ACK-05", "ACK-14", "LIF-12")
class ForgetsWhatIsHeld(Saboteur):
    """Loses at the end of a subscription what was not settled."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries
            deliveries._deliveries._unsettled.clear()  # type: ignore[attr-defined]  # noqa: SLF001

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        if len(self._queues) == 1 and len(self._queues[0]) > 20:  # noqa: PLR2004
            await anext(deliveries)  # read ahead, and lost as well
        return delivery


@_caught_by("ACK-14", "LIF-11")
class HandsOverLate(Saboteur):
    """Leaves what was not settled to the bound for crashes."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries
            member: Any = deliveries._deliveries  # type: ignore[attr-defined]  # noqa: SLF001
            asyncio.get_running_loop().call_later(30, member._queue.put_back, [*member._unsettled.values()])  # noqa: SLF001
            member._unsettled.clear()  # noqa: SLF001


@_caught_by("GRP-06", "LIF-11")
class TakesAlong(Saboteur):
    """Takes what is waiting along when a member leaves."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries
            deliveries._deliveries._queue._waiting.clear()  # type: ignore[attr-defined]  # noqa: SLF001


@_caught_by("GRP-05")
class StumblesOverJoining(Saboteur):
    """Loses what waits when a member joins."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            deliveries._deliveries._queue._waiting.clear()  # type: ignore[attr-defined]  # noqa: SLF001
            yield deliveries


@_caught_by("SUB-04", "SUB-17", "SUB-05")
class KeepsOneSubscription(Saboteur):
    """Has one subscription a topic: the last."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        for queue in self._queues:
            queue.topics -= set(topics)
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries


@_caught_by("SUB-17")
class UnsubscribesAll(Saboteur):
    """Ends all subscriptions to a topic with one."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries
        for queue in self._queues:
            queue.topics -= set(topics)


@_caught_by("SUB-15")
class EndsWhenIdle(Saboteur):
    """Ends when nothing came for a moment."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        try:
            return await asyncio.wait_for(super().read(deliveries), 0.005)
        except TimeoutError:
            raise StopAsyncIteration from None


@_caught_by("SUB-13")
class LosesWithAWait(Saboteur):
    """Takes a delivery along when waiting for it is cancelled."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        delivery.settler._inner._unsettled.pop(delivery)  # type: ignore[attr-defined]  # noqa: SLF001
        await asyncio.sleep(0)
        return delivery


@_caught_by("SUB-03")
class GoesOnReading(Saboteur):
    """Reads from its latest subscription even when it is over."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            self._latest: AsyncIterator[Delivery] = deliveries
            yield _Reading(deliveries, lambda _: anext(self._latest))


@_caught_by("SUB-18", "ISO-04")
class SwallowsTheProgramsErrors(Saboteur):
    """Ends a subscription's block as if nothing had been raised."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            with suppress(LookupError):
                yield deliveries


@_caught_by("SUB-16")
class SubscribesWhenClosed(Saboteur):
    """Opens again to subscribe."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        self._closed = False
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries


@_caught_by("SUB-19")
class ShowsThePast(Saboteur):
    """Gives a new subscription what was sent before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._past: list[Message] = []

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._past.append(message)

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        others, self._queues = self._queues, []
        async with super().subscribe(topics, **options) as deliveries:
            for message in self._past[-3:]:
                if Topic(message.message_type, message.message_name) in topics:
                    await super().send_message(message)
            self._queues = others + [queue for queue in self._queues if queue not in others]
            yield deliveries


@_caught_by("SUB-20")
class EntersUncancellably(Saboteur):
    """Goes on subscribing when that is cancelled."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.005)
            yield deliveries


@_caught_by("SUB-08", "UNR-06")
class HasFewSubscriptions(Saboteur):
    """Has a limit that it does not tell."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        self._count = getattr(self, "_count", 0) + 1
        try:
            if self._count > 8:  # noqa: PLR2004
                raise BrokerUnavailable("too many subscriptions")
            async with super().subscribe(topics, **options) as deliveries:
                yield deliveries
        finally:
            self._count -= 1


@_caught_by("HDR-09")
class GivesAllTheSame(Saboteur):
    """Gives every subscription one and the same delivery."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._given: dict[bytes, Delivery] = {}

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        return self._given.setdefault(delivery.body, delivery)


@_caught_by("PSN-01", "PSN-02", "PSN-06")
class DiesOfGarbage(Saboteur):
    """Cannot give out what it cannot read."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        decode(delivery.body)
        return delivery


@_caught_by("PSN-01", "PSN-02")
class SkipsGarbage(Saboteur):
    """Acknowledges what it cannot read, and tells nobody."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        while True:
            delivery = await super().read(deliveries)
            try:
                decode(delivery.body)
            except ValueError:
                await delivery.ack()
            else:
                return delivery


@_caught_by("PSN-03")
class SkipsStrangers(Saboteur):
    """Acknowledges what is of another name than its topic, and tells nobody."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        while True:
            delivery = await super().read(deliveries)
            if _json(delivery.body).get("message_name", delivery.topic.message_name) == delivery.topic.message_name:
                return delivery
            await delivery.ack()


@_caught_by("UNR-01")
class DropsWhatNobodyWants(Saboteur):
    """Keeps nothing for a later subscription."""

    async def send_message(self, message: Message, /) -> None:
        await super().send_message(message)
        self._kept.take_all([Topic(message.message_type, message.message_name)])


@_caught_by("UNR-03")
class WaitsForADestination(Saboteur):
    """Waits until somebody subscribes."""

    async def send_message(self, message: Message, /) -> None:
        while not any(Topic(message.message_type, message.message_name) in queue.topics for queue in self._queues):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await super().send_message(message)


# -- beginning and end -------------------------------------------------------------------------------------------


@_caught_by("PUB-10", "LIF-01", "LIF-02", "LIF-03", "LIF-04", "LIF-07", "API-01", "SUB-16")
class NeverCloses(Saboteur):
    """Goes on after it was closed."""

    async def aclose(self) -> None:
        """Do nothing."""


@_caught_by("LIF-02")
class FailsToCloseTwice(Saboteur):
    """Raises when it is closed again."""

    async def aclose(self) -> None:
        if self._closed:
            raise BrokerError("it is closed")
        await super().aclose()


@_caught_by("LIF-02", "LIF-07")
class HangsWhenClosedTwice(Saboteur):
    """Waits for a close that is over."""

    async def aclose(self) -> None:
        if self._closed:
            await asyncio.sleep(_FOREVER)
        await super().aclose()


@_caught_by("LIF-03")
class ConnectsToClose(Saboteur):
    """Cannot close what was not used."""

    _used = False

    async def send_message(self, message: Message, /) -> None:
        self._used = True
        await super().send_message(message)

    async def aclose(self) -> None:
        if not self._used and not self._queues:
            await asyncio.sleep(_FOREVER)
        await super().aclose()


@_caught_by("LIF-07")
class ClosesHalf(Saboteur):
    """Releases nothing when its close was cancelled once."""

    _closing = False

    async def aclose(self) -> None:
        if self._closing:
            return
        self._closing = True
        await asyncio.sleep(0)
        await super().aclose()


@_caught_by("LIF-04")
class SwallowsErrorsOfItsBlock(Saboteur):
    """Ends `async with` as if nothing had been raised."""

    async def __aexit__(self, *exc_info: object) -> bool:  # type: ignore[override]
        await super().aclose()
        return exc_info[0] is LookupError


@_caught_by("LIF-18", "LIF-01")
class SharesItsState(Saboteur):
    """Keeps on the class whether it is closed."""

    closed_by: ClassVar[set[object]] = set()

    async def send_message(self, message: Message, /) -> None:
        if self.closed_by:
            self._closed = True
        await super().send_message(message)

    async def aclose(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed_by.add(loop)
        loop.call_later(0.03, self.closed_by.clear)
        await super().aclose()


@_caught_by("LIF-08", "LIF-21")
class CannotBeWoken(Saboteur):
    """Finishes its blocking read before it ends."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        reading = asyncio.ensure_future(super().read(deliveries))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait({reading}, timeout=1.5)
            reading.cancel()
            raise


@_caught_by("LIF-19")
class FailsToEndWhenClosed(Saboteur):
    """Cannot end a subscription whose connection is gone."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries
            if self._closed:
                raise BrokerUnavailable("cannot unsubscribe")


@_caught_by("LIF-13")
class HoldsALock(Saboteur):
    """Cannot send or subscribe while a delivery is out."""

    async def send_message(self, message: Message, /) -> None:
        while any(queue for queue in self._out):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await super().send_message(message)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._out: list[Delivery] = []

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        self._out.append(delivery)
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        await super().ack(settle, delivery)
        self._out.remove(delivery)


# -- leaks and manners -------------------------------------------------------------------------------------------


@_caught_by("LEK-01", "LEK-03", "LEK-05")
class LeaksATask(Saboteur):
    """Leaves a task behind for each subscription."""

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        self._task = asyncio.create_task(asyncio.sleep(_FOREVER))
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries


@_caught_by("LEK-01", "LEK-03")
class LeaksASocket(Saboteur):
    """Leaves a connection open."""

    kept: ClassVar[list[socket.socket]] = []

    async def send_message(self, message: Message, /) -> None:
        if not hasattr(self, "_socket"):
            self._socket = socket.socket()
            self.kept.append(self._socket)
        await super().send_message(message)


@_caught_by("LEK-02")
class FailsUnseen(Saboteur):
    """Has a task fail, and nobody looks."""

    async def aclose(self) -> None:
        async def fail() -> None:
            raise BrokerUnavailable("the connection is gone")

        if not self._closed:
            self._task: Any = asyncio.create_task(fail())
            await asyncio.sleep(0)
            self._task = None
        await super().aclose()


@_caught_by("LEK-06", "LEK-08")
class KeepsDeliveries(Saboteur):
    """Keeps whatever it gave out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._history: list[Delivery] = []

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        self._history.append(await super().read(deliveries))
        return self._history[-1]


@_caught_by("LEK-05")
class KeepsSubscriptions(Saboteur):
    """Keeps every subscription that there was."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._history: list[AsyncIterator[Delivery]] = []

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, **options) as deliveries:
            self._history.append(deliveries)
            yield deliveries


@_caught_by("LEK-10")
class LeaksATaskForWhatIsHeld(Saboteur):
    """Goes on renewing what was never settled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._renewals: dict[Delivery, asyncio.Task[None]] = {}

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        self._renewals[delivery] = asyncio.create_task(asyncio.sleep(_FOREVER))
        return delivery

    async def ack(self, settle: Settler, delivery: Delivery) -> None:
        self._renewals.pop(delivery).cancel()
        await super().ack(settle, delivery)


@_caught_by("FLW-12")
class AsksAllTheTime(Saboteur):
    """Waits by asking again and again."""

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        reading = asyncio.ensure_future(super().read(deliveries))
        try:
            while not reading.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            return reading.result()
        finally:
            reading.cancel()


@_caught_by("FLW-07")
class BlocksTheLoop(Saboteur):
    """Lets nobody run while it writes."""

    _count = 0

    async def send_message(self, message: Message, /) -> None:
        self._count += 1
        if self._count == 300:  # noqa: PLR2004
            time.sleep(0.6)  # noqa: ASYNC251
        await super().send_message(message)


@_caught_by("OBS-04")
class CriesWolf(Saboteur):
    """Warns when nothing is wrong."""

    async def aclose(self) -> None:
        logger.warning("the connection was closed")
        await super().aclose()


@_caught_by("OBS-05")
class LogsPayloads(Saboteur):
    """Shows in its log what a message holds."""

    async def send_message(self, message: Message, /) -> None:
        logger.debug("sending %s", message.payload_json)
        await super().send_message(message)


# -- the contract ------------------------------------------------------------------------------------------------


@_caught_by("API-02", "GRP-14")
class AcceptsWhatItCannot(Saboteur):
    """Promises no groups, and takes them all the same."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, distribution=frozenset({"broadcast"}), subscription="ephemeral")


@_caught_by("API-10")
class GuessesItsCapabilities(Saboteur):
    """Promises what cannot be without something that it does not promise."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, settlement="none", receipt="none")


@_caught_by("API-03")
class ChangesItsMind(Saboteur):
    """Promises something else once it is connected."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ordering="none" if self._queues else "destination")


@_caught_by("API-04")
class HasOtherDefaults(Saboteur):
    """Prefetches one where nothing was said."""

    @asynccontextmanager
    async def subscribe(
        self,
        topics: Collection[Topic],
        /,
        *,
        group: str | None = None,
        prefetch: int = 1,
        on_gap: OnGap | None = None,
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        async with super().subscribe(topics, group=group, prefetch=prefetch, on_gap=on_gap) as deliveries:
            yield deliveries


@_caught_by("API-07")
class CallsFromAnotherThread(Saboteur):
    """Talks to the event loop from outside, which only the debug mode notices."""

    async def send_message(self, message: Message, /) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(lambda: loop.call_soon(int))
        await super().send_message(message)


@_caught_by("API-11")
class SaysThatItEnlists(Saboteur):
    """Takes itself for an outbox."""

    enlists = True


@_caught_by("UNR-01", "UNR-02")
class ReportsNothing(Saboteur):
    """Promises to say that nobody was there, and does not."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, unroutable="reported")


@_caught_by("ACK-12")
class RobsSlowMembers(Saboteur):
    """Gives to another what somebody is working on."""

    @property
    def capabilities(self) -> Capabilities:
        redelivery = frozenset({*super().capabilities.redelivery, "deadline"})
        return replace(super().capabilities, redelivery=redelivery, redelivery_bound=0.1)

    async def read(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        delivery = await super().read(deliveries)
        asyncio.get_running_loop().call_later(0.1, self._rob, deliveries, delivery)
        return delivery

    @staticmethod
    def _rob(member: Any, delivery: Delivery) -> None:
        if entry := member._unsettled.pop(delivery, None):  # noqa: SLF001
            member._queue.put_back([entry])  # noqa: SLF001


@_caught_by("PUB-06")
class BatchesCarelessly(Saboteur):
    """Skips without a word what of a batch cannot be sent."""

    async def send_messages(self, messages: Sequence[Message], /) -> None:
        for message in messages:
            with suppress(DiatorError):
                await self.send_message(message)


@_caught_by("ISO-09")
class HasOneConnection(Saboteur):
    """Shares one connection among all brokers, and takes it from the others to subscribe."""

    everybody: ClassVar[weakref.WeakSet[Saboteur]] = weakref.WeakSet()

    @asynccontextmanager
    async def subscribe(
        self, topics: Collection[Topic], /, **options: Any
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        self.everybody.add(self)
        for other in {*self.everybody} - {self}:
            for queue in other._queues:  # noqa: SLF001
                queue.topics.clear()
        async with super().subscribe(topics, **options) as deliveries:
            yield deliveries


# -- the consumer ------------------------------------------------------------------------------------------------


def _consumed_by(consumer: type[Consumer], *ids: str) -> None:
    """Make a saboteur that is the healthy transport below a broken *consumer*."""
    made: type[Saboteur] = type(consumer.__name__, (Saboteur,), {"consumer": consumer, "__doc__": consumer.__doc__})
    _caught_by(*ids)(made)


class CutsOff(Consumer):
    """Cancels what is being handled when it is stopped."""

    def stop(self) -> None:
        super().stop()
        super().stop()


class GoesOnForever(Consumer):
    """Waits for what is being handled, however long that takes."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["drain_timeout"] = 1.0
        super().__init__(broker, **options)

    def stop(self) -> None:
        if not self._stopping.is_set():
            super().stop()


class HandlesOneMore(Consumer):
    """Handles one more at once than it was allowed."""

    def __init__(self, broker: ReadableBroker, *, concurrency: int = 1, **options: Any) -> None:
        super().__init__(broker, concurrency=concurrency + 1, **options)


class HasNoTimeout(Consumer):
    """Lets a handler hang."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        options["handler_timeout"] = _FOREVER
        super().__init__(broker, **options)


class RetriesOnceMore(Consumer):
    """Handles once more than it was told."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        more = RetryPolicy(immediate_pause=0.01) if retry is None else retry
        more = replace(more, immediate=more.immediate + 1, permanent=())
        super().__init__(broker, retry=more, **options)


class IgnoresRequirements(Consumer):
    """Starts whatever is required."""

    def __init__(self, broker: ReadableBroker, *, requires: Capabilities | None = None, **options: Any) -> None:
        super().__init__(broker, **options)


class ReadsTheEventOnce(Consumer):
    """Gives a handler that is called again what the first call has left."""

    def __init__(self, broker: ReadableBroker, **options: Any) -> None:
        super().__init__(broker, **options)
        for topic, route in self._routes.items():
            read = functools.cache(route.read)
            self._routes[topic] = replace(route, read=read)


class GivesUpOnAnAnswer(Consumer):
    """Takes an answer for a failure, and success for a reason to stop."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, outcome="dead_lettered"))

        super().__init__(broker, on_handled=note, **options)


class NeverForgets(Consumer):
    """Counts as in flight what is done."""

    def health(self) -> Health:
        return replace(super().health(), in_flight=1, receiving=True)


class StopsWithTheNextMessage(Consumer):
    """Does not notice its stop while it waits."""

    def stop(self) -> None:
        asyncio.get_running_loop().call_later(1.5, super().stop)


class RetriesWhatCannotBeRead(Consumer):
    """Says nothing about why it put something aside."""

    def __init__(self, broker: ReadableBroker, *, on_handled: Callable[[Handled], None], **options: Any) -> None:
        def note(handled: Handled) -> None:
            on_handled(replace(handled, reason=None))

        super().__init__(broker, on_handled=note, **options)


class TakesAnyRetry(Consumer):
    """Accepts a policy, and leaves out what the transport cannot."""

    def __init__(self, broker: ReadableBroker, *, retry: RetryPolicy | None = None, **options: Any) -> None:
        super().__init__(broker, retry=retry and replace(retry, delayed=0), **options)


for _consumer, _ids in {
    CutsOff: ("LIF-05",),
    GoesOnForever: ("LIF-06", "LIF-20"),
    HandlesOneMore: ("FLW-01", "FLW-13"),
    HasNoTimeout: ("PSN-07",),
    RetriesOnceMore: ("PSN-04", "PSN-14"),
    IgnoresRequirements: ("API-02",),
    ReadsTheEventOnce: ("PSN-10",),
    GivesUpOnAnAnswer: ("SUB-11", "ISO-08", "ACK-18", "PSN-09", "PSN-11"),
    NeverForgets: ("LEK-09", "LIF-21"),
    StopsWithTheNextMessage: ("LIF-21",),
    RetriesWhatCannotBeRead: ("PSN-01", "PSN-03", "PSN-13"),
    TakesAnyRetry: ("ACK-04",),
}.items():
    _consumed_by(_consumer, *_ids)


@_caught_by("PSN-15")
class CannotRetryAndSaysNothing(Saboteur):
    """Does not promise a retry, and is run by a consumer that takes any policy."""

    consumer: ClassVar[type[Consumer]] = TakesAnyRetry

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, delayed_retry=False)
