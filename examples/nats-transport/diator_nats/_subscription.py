"""Reading: JetStream pushes to a callback, as many messages as it has credit for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from nats.aio.msg import Msg

from diator.brokers.arrivals import Arrivals
from diator.brokers.base import Delivery
from diator.brokers.leases import Leased, Leases
from diator.brokers.settling import Acknowledgements, dead_letter_headers, send_dead_letter
from diator.brokers.supervisor import ResilientSubscription, Source, SubscriptionSettings
from diator.exceptions import BrokerError
from diator_nats._link import Link, Refused
from diator_nats._names import consumer_of

if TYPE_CHECKING:
    from diator_nats.broker import Service


CONSUMER: Mapping[str, Any] = {
    "deliver_policy": "new",
    "ack_policy": "explicit",
    "max_deliver": -1,
    "max_ack_pending": -1,
}


class Token(Leased):
    """A delivery that JetStream has lent to us."""

    reply: str  # the subject that takes its settlement
    sequence: int  # of its message, in the stream
    headers: Mapping[str, str]


class Subscription(ResilientSubscription):
    """One consumer of a group, or of a group of its own, which exists as long as it is read."""

    def __init__(self, settings: SubscriptionSettings, service: Service) -> None:
        super().__init__(settings, lossy=False, buffer_size=min(settings.prefetch, 16))
        self.service, self.group = service, settings.group
        self.topics = {service.subject(topic): topic for topic in settings.topics}
        member = f"\0{uuid4()}" if self.group is None else self.group
        self.consumers = {subject: consumer_of(member, *topic) for subject, topic in self.topics.items()}
        self.created: dict[str, str] = {}  # when JetStream made each consumer: another time is another consumer
        self.caught_up = datetime.now(UTC)
        self.credit: dict[str, int] = {}  # how many more messages JetStream may push
        # The same for all connections: what JetStream still pushes for a lost connection arrives on the next one.
        self.answers = f"_INBOX.{uuid4().hex}"
        self.arrivals = Arrivals()
        self.link: Link | None = None
        self.in_sync = 0.0  # whatever JetStream pushed before this time has arrived
        self.in_order_at = 0.0  # when whatever a lost connection did not deliver has come back to JetStream
        self.leases = Leases[Token](self, service.lease, self.renew)
        self.acks = Acknowledgements(partial(self.settle, b"+ACK"), self.log_fields)

    # -- receiving -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Source, None]:
        self.in_sync = monotonic()
        self.arrivals = Arrivals(self.arrivals.take_all())  # those of a lost connection are still ours
        lost = partial(self.arrivals.fail, ConnectionError("the connection to NATS is lost"))
        opening = Link.open(self.service.url, self.service.timeout, self.service.options, lambda _: lost())
        async with await opening as self.link:
            pushing = await self.link.subscribe(f"{self.answers}.>", self.on_message)
            await self.service.declare(self.link)
            for subject in self.topics:
                await self.declare(self.link, subject)
            self.in_order_at = self.in_sync + self.service.lease if self.leases.have_begun else 0.0
            self.leases.begin()
            try:
                yield self
            finally:
                if not self.link.is_lost:  # what is under way arrives now, and goes back to the group at once
                    with suppress(Exception):
                        async with asyncio.timeout(self.service.timeout / 2):
                            await pushing.drain()

    async def declare(self, link: Link, subject: str) -> None:
        """Make the consumer of a topic, unless it exists."""
        stream, name = self.service.stream, self.consumers[subject]
        metadata = {"group": self.group or "", "topic": json.dumps(self.topics[subject])}
        config = {**CONSUMER, "name": name, "filter_subject": subject, "metadata": metadata}
        config["ack_wait"] = nanoseconds(self.service.lease)
        if self.group is None:  # `receive` may wait a lease
            config["inactive_threshold"] = nanoseconds(self.service.absence + self.service.lease)
        else:
            config["durable_name"] = name
        create = f"CONSUMER.CREATE.{stream}.{name}.{subject}"
        answer = await link.api(create, self.service.timeout, stream_name=stream, config=config)
        self.credit[subject] = 0
        if self.created.setdefault(subject, answer["created"]) != answer["created"]:
            self.created[subject] = answer["created"]
            self.report_gap(self.caught_up, "its consumer was deleted")

    async def receive(self, limit: int, /) -> Sequence[Delivery]:
        received: Sequence[Delivery] = []
        # What JetStream counts as delivered, and is not here, comes again before anything new.
        waits = monotonic() < self.in_order_at and await self.total("num_ack_pending") > self.unsettled
        for subject in () if waits else self.topics:
            await self.allow(subject, max(1, limit // len(self.topics)))
        with suppress(TimeoutError):
            async with asyncio.timeout(self.service.lease / 20 if waits else None):
                received = await self.arrivals.receive(limit)
        leased = [delivery for delivery in received if token_of(delivery).is_leased]
        self.leases.hold([token_of(delivery) for delivery in leased])
        return leased

    async def allow(self, subject: str, messages: int) -> None:
        """Let JetStream push so many messages of a topic. It forgets that before the connection could count as dead."""
        missing = messages - self.credit[subject]
        if missing > messages // 2 and self.link is not None:
            self.credit[subject] += missing
            asked = json.dumps({"batch": missing, "expires": nanoseconds(self.service.reconnect.idle_timeout)})
            subject_of_api = f"$JS.API.CONSUMER.MSG.NEXT.{self.service.stream}.{self.consumers[subject]}"
            await self.link.client.publish(subject_of_api, asked.encode(), reply=f"{self.answers}.{subject}")

    async def on_message(self, message: Msg) -> None:
        headers = {str(name): value for name, value in (message.headers or {}).items()}
        if (topic := self.topics.get(message.subject)) is not None:
            self.credit[message.subject] = max(0, self.credit[message.subject] - 1)
            lent = message.metadata
            token = Token(message.reply, lent.sequence.stream, headers, leased_until=self.in_sync + self.service.lease)
            body, attempt = message.data, lent.num_delivered
            pushed = Delivery(topic=topic, body=body, headers={}, attempt=attempt, settler=self, token=token)
            self.arrivals.put(pushed)
            return
        subject = message.subject.removeprefix(f"{self.answers}.")  # the end of a permission to push
        self.credit[subject] -= min(self.credit[subject], int(headers.get("Nats-Pending-Messages", 1 << 30)))
        if headers.get("Status") == "503" or "Deleted" in headers.get("Description", ""):
            self.arrivals.fail(ConnectionError("the consumer was deleted"))
        else:
            self.arrivals.note_answer()  # so that it is renewed

    async def total(self, what: str) -> int:
        assert self.link is not None
        names = (f"CONSUMER.INFO.{self.service.stream}.{name}" for name in self.consumers.values())
        return sum([(await self.link.api(name, self.service.timeout))[what] for name in names])

    async def probe(self) -> None:
        """Ask whether the consumers still exist, and whether they have more for us."""
        began = datetime.now(UTC)
        try:
            if not await self.total("num_pending"):
                self.caught_up = began
        except Refused:
            self.arrivals.fail(ConnectionError("the consumer was deleted"))
        self.arrivals.note_answer()

    # -- settling ------------------------------------------------------------------------------------------------

    async def ack(self, delivery: Delivery, /) -> None:
        self.leases.release(token_of(delivery))
        self.acks.add(token_of(delivery))

    async def retry(self, delivery: Delivery, after: float, /) -> None:
        self.leases.release(token_of(delivery))
        delay = f' {{"delay": {nanoseconds(after)}}}' if after > 0 else ""
        await self.settle(f"-NAK{delay}".encode(), [token_of(delivery)])

    async def dead_letter(self, delivery: Delivery, reason: str, /) -> None:
        token = token_of(delivery)
        self.leases.release(token)
        if not token.is_leased:
            return
        source, sequence = self.service.subject(delivery.topic), str(token.sequence)
        about = dead_letter_headers(delivery, reason, source=source, group=self.group or "", sequence=sequence)
        theirs = {name: value for name, value in token.headers.items() if not name.lower().startswith("nats-")}
        omitted = ["headers"] if len(theirs) < len(token.headers) else []
        send = partial(self.service.publish, self.service.dead_subject(delivery.topic, self.group))
        await send_dead_letter(delivery.body, theirs, about, send, omitted=omitted)
        await self.settle(b"+ACK", [token])

    async def settle(self, how: bytes, tokens: Collection[Token]) -> None:
        """Settle what is ours. JetStream takes a settlement from anybody: the clock of this process is the fence."""
        ours = (self.service.request(token.reply, how) for token in tokens if token.is_leased)
        for error in await asyncio.gather(*ours, return_exceptions=True):
            if error is not None:
                raise error

    async def renew(self, held: Collection[Token]) -> Collection[Token]:
        if self.link is not None and not self.link.is_lost:
            began = monotonic()
            with suppress(BrokerError):  # without an answer, what arrives counts as old
                await self.link.echo(asyncio.get_running_loop().time() + self.service.lease / 3)
                self.in_sync = began
        await self.settle(b"+WPI", held)
        return [token for token in held if not token.is_leased]

    async def leave(self, prefetched: Collection[Delivery], /) -> None:
        held = {*await self.leases.end(), *map(token_of, self.arrivals.take_all())}
        with suppress(BrokerError, TimeoutError):  # then the leases end by themselves
            async with asyncio.timeout(self.service.timeout):
                await self.acks.flush()
                if self.group is None:
                    for name in self.consumers.values():
                        await self.service.request(f"$JS.API.CONSUMER.DELETE.{self.service.stream}.{name}")
                await asyncio.sleep(0.02)  # otherwise JetStream might push them to the connection that has just ended
                await self.settle(b"-NAK", sorted(held, key=lambda token: token.sequence))
        for token in held:
            token.leased_until = 0.0  # whoever settles it from now on is too late


def token_of(delivery: Delivery) -> Token:
    return cast("Token", delivery.token)


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
