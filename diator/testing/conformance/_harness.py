"""The harness: how the suite gets a transport, and what the suite can do to its environment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

from diator.brokers.base import Topic, Transport
from diator.consumer import Consumer
from diator.testing._suite.environment import Environment, Pace
from diator.testing.fault_proxy import FaultProxy, Flow
from diator.testing.servers import ServerProcess


@dataclass(frozen=True, kw_only=True)
class Limits(Pace):
    """
    How fast an environment is. All times are in seconds.

    Attributes:
        scale: The factor for the timeout of every scenario. `DIATOR_CONFORMANCE_SCALE` sets the default.
        quiet: How long a subscription must stay silent until the suite concludes that nothing more arrives. Used only
            after a fence, or while the prefetch is full.
        redelivery: The longest time until an unsettled delivery is redelivered after its subscription has ended. A
            lease should be longer than this and `lag` together, so that its end does not pass for the return at once.
        timeout: The longest time that a call of the transport may take, however dead the service is: its `timeout`.
        liveness: The longest time until the transport notices that a silent peer is gone.
        recovery: The longest time until the transport receives again after the service is back or the link is healed.
            It covers the delay before the next attempt to connect, the connecting, and, if the service frees what a
            lost connection held only when a lease or a session ends, that time too. It does not cover the fault itself.
        max_delay: The longest delay between two attempts to reconnect.
        absence: The longest time that the service collects messages for a subscription without a group after the
            process of the subscription has died.
        standstill: The longest time that the event loop may stand still. The suite interrupts what blocks it longer.
        lag: How late a delivery may be on a busy machine, in scenarios where one task must not hold up another.
    """

    quiet: float = 0.1
    redelivery: float = 5.0
    timeout: float = 10.0
    liveness: float = 15.0
    recovery: float = 10.0
    max_delay: float = 30.0
    absence: float = 10.0


@dataclass(frozen=True, kw_only=True)
class DeadLettered:
    """
    A dead letter, as the service has it.

    Attributes:
        body: The body of the message, as it was sent.
        reason: Why the message was dead-lettered.
        headers: The headers of the dead letter, at least those of the message; None if the transport has none.
    """

    body: bytes
    reason: str
    headers: Mapping[str, str] | None = None


class Proxy(Protocol):
    """
    A proxy between a transport and its service that injects faults. `FaultProxy` is one.

    Methods that take *flows* affect both directions if none is passed.
    """

    @property
    def accepted(self) -> int:
        """The number of connections since the start."""
        ...

    @property
    def connections(self) -> int:
        """The number of open connections."""
        ...

    @property
    def clients(self) -> int:
        """The number of open connections that their clients have not closed, even if a fault holds that back."""
        ...

    @property
    def passed(self) -> Mapping[Flow, int]:
        """The number of bytes that were passed on, by direction."""
        ...

    @property
    def lost(self) -> Mapping[Flow, int]:
        """The number of bytes that were lost for good, by direction."""
        ...

    def withhold(self, *flows: Flow) -> None:
        """Hold back all data until `heal`."""

    def black_hole(self, *flows: Flow) -> None:
        """Lose all data, and the ends of connections too: neither side notices it."""

    def delay(self, seconds: float, jitter: float) -> None:
        """Delay each piece of data by *seconds*, plus or minus up to *jitter*, in order, until `heal`."""

    def cut_after(self, count: int, flow: Flow) -> None:
        """Break every connection once, as soon as *count* more bytes have gone in the direction of *flow*."""

    def black_hole_existing(self) -> None:
        """Lose all data of the open connections for good. New connections are not affected."""

    def refuse(self) -> None:
        """Refuse new connections until `heal`."""

    def reject(self) -> None:
        """Accept new connections, count them, and break each at once, until `heal`."""

    def cut(self) -> None:
        """Close every connection in an orderly way."""

    def reset(self) -> None:
        """Break every connection."""

    async def heal(self) -> None:
        """Pass on all data and accept new connections again."""


class Outages(Protocol):
    """
    A service that belongs to one scenario and can be broken.

    `start` and `resume` return when the service answers, the other methods when it no longer answers. The address of
    the service stays the same. A method does nothing if the service is already in the state that the method causes.
    """

    async def stop(self) -> None:
        """Stop the service in an orderly way, as for an update."""

    async def kill(self) -> None:
        """Kill the service's process at once, as SIGKILL does."""

    async def start(self) -> None:
        """Start the service again, with the data that it had."""

    async def pause(self) -> None:
        """Freeze the service: its connections stay open, and nothing answers."""

    async def resume(self) -> None:
        """Let the frozen service continue."""


Access: TypeAlias = Literal[
    "granted", "unknown authority", "wrong host", "expired", "plain", "wrong password", "may not send", "may not read"
]


Foreign: TypeAlias = Literal["metadata", "headers", "large", "counters", "compressed", "due times"]


class Harness(Environment):
    """
    How the suite gets a transport, and what the suite can do to its environment.

    The suite makes a harness without arguments. Every name that the suite uses is new, so that the service may be
    shared. Leave a method that the environment does not support as it is here: the scenarios that need it are not run,
    and the report lists them.

    Attributes:
        name: The name of the transport in the report.
        facilities: The names of the supported optional methods: `raw`, `foreign`, `dead_letters`, `full`, `retention`,
            `crash`, `proxy`, `outages`, `operator`, `topology`, `alarm` and `security`. The docstring of each optional
            method begins with the name of its facility. `processes` has no method: it means that a harness made in
            another process reaches the same service.
        limits: How fast the environment is.
        deviations: The scenarios that are known to fail, by id.
        consumer: The consumer class in scenarios that test a transport and a consumer together. Only the tests of the
            suite itself use another one.
        service_address: The host and port of the service, which `start` sets if the service has an address.
        address: Where `transport` connects to. `start` sets it to the same; `proxied` and `at` change it for a time.
        breakable: A server for `private`, which `prepare("outages")` makes and starts, and `stop` closes.
        password: `security`: The right password. It must appear nowhere, so choose a word that appears nowhere by
            chance.
    """

    limits: Limits = Limits()
    consumer: ClassVar[type[Consumer]] = Consumer
    password: str = ""
    service_address: tuple[str, int]
    address: tuple[str, int]
    breakable: ServerProcess | None = None

    @abstractmethod
    def transport(self) -> Transport:
        """
        Return a new broker. The suite calls this inside a running event loop, several times in a scenario.

        Brokers that promise `multi_process` share one service.
        """

    # -- optional ------------------------------------------------------------------------------------------------

    async def send_raw(self, transport: Transport, topic: Topic, body: bytes) -> None:
        """`raw`: Store *body* as a message of *topic* in the service, without the transport's own send."""
        raise NotImplementedError

    async def send_foreign(
        self, transport: Transport, topic: Topic, group: str | None, kind: Foreign, body: bytes
    ) -> int:
        """
        `foreign`: Store messages of *kind* for *topic*, as a program without diator can. Return their number.

        Unless the kind says otherwise, each message has *body*, which a consumer can decode. Store one message for each
        variation that the service allows; *group* is the only one that receives them. If the service has nothing beside
        the body, replace the `headers` in the body.

        - `metadata`: what stands beside the body (headers, properties, fields) cannot be decoded: bytes that are not
          UTF-8, numbers and times out of range, deep nesting, wrong lengths.
        - `headers`: names, values and types of headers that diator never writes, all valid for the service.
        - `large`: as large as the service takes, and larger than `max_message_bytes`. The body is another one.
        - `counters`: with each name under which the service or the transport counts deliveries, and a large number.
        - `compressed`: in each compression that the service or its clients know. The body may be another one.
        - `due times`: stored where delayed retries wait, with due times that are far away or cannot be decoded. Their
          number is not used.

        Raises:
            EnvironmentMissing: The service has nothing of this kind. The scenario is not run.
        """
        raise NotImplementedError

    async def dead_letters(self, transport: Transport, topic: Topic, group: str | None) -> list[DeadLettered]:
        """
        `dead_letters`: Return the dead letters of *topic* and *group*, as the service has them.

        *group* is None for a subscription without a group. Return the bodies as they were sent, whatever else the
        service stores with them.
        """
        raise NotImplementedError

    def full(self, room: int) -> Transport:
        """
        `full`: Return a broker whose service accepts *room* messages for each topic and group, and refuses the next.

        A message takes room from its confirmation on, also while it is prefetched. An acknowledged message takes none,
        within `limits.lag`. If one group has no room, the message is refused for all groups.
        """
        raise NotImplementedError

    def retaining(self, room: int) -> Transport:
        """
        `retention`: Return a broker that retains *room* messages for a topic to which nobody has subscribed.

        The service refuses further ones. It may accept a few more than *room*, at most twice as many.
        """
        raise NotImplementedError

    async def crash(self, transport: Transport) -> None:
        """
        `crash`: Make *transport* and its subscriptions die as if their process had died.

        From then on *transport* sends nothing to the service: no acknowledgement, no orderly close, no new connection.
        The service sees what it sees when a process dies: broken connections. The scenario closes the rest of
        *transport* in this process, which has to be quick and must not raise.
        """
        raise NotImplementedError

    @asynccontextmanager
    async def proxied(self) -> AsyncGenerator[Proxy, None]:
        """
        `proxy`: Start a proxy in front of the service. Inside the block, `transport` connects through it.

        Inside the block of `private`, the proxy is in front of that service. A second, nested call starts a second
        proxy. Brokers that were made before keep the first one, so that a scenario can cut off one side of a
        conversation.

        Write it only if `transport` does not connect to `address`.
        """
        before = self.address
        async with FaultProxy(*self.service_address) as proxy:
            self.address = proxy.host, proxy.port
            try:
                yield proxy
            finally:
                self.address = before

    @contextmanager
    def at(self, address: tuple[str, int]) -> Generator[None, None, None]:
        """Inside the block, the service is the one at *address*: for `private`."""
        before = self.service_address, self.address
        self.service_address = self.address = address
        try:
            yield
        finally:
            self.service_address, self.address = before

    @asynccontextmanager
    async def private(self) -> AsyncGenerator[Outages, None]:
        """
        `outages`: Start a service that nobody else uses. Inside the block, `transport` connects to it.

        Configure the service so that it loses nothing. The scenarios may use one service in turn: it must run when the
        block is entered, whatever the previous scenario did to it.

        By default the service is `breakable`. Write it only if `transport` does not connect to `address`.
        """
        if self.breakable is None:
            raise NotImplementedError
        async with self.breakable.breakable() as server:
            with self.at(server.address):
                yield server

    async def disconnect(self, transport: Transport) -> None:
        """
        `operator`: Make the service close all connections of *transport*, and no others, as an operator does.

        *transport* may be connected through a proxy. Wait until each of its subscriptions is `connected`, or the
        service closes a connection that is lost already.
        """
        raise NotImplementedError

    async def delete(self, transport: Transport, topic: Topic, group: str | None) -> None:
        """
        `topology`: Delete, directly at the service, what a subscription to *topic* needs.

        With *group*, delete what belongs to the group alone, such as its queue or its position. Without *group*, delete
        the destination of the messages, such as the topic, the stream or the exchange. Messages in it are lost. The
        subscription may be one of another broker.
        """
        raise NotImplementedError

    def alarm(self) -> AbstractAsyncContextManager[None]:
        """
        `alarm`: Make the service of `private` run out of memory or disk. It accepts no messages inside the block.

        It keeps serving consumers. The suite uses this only inside the block of `private`.
        """
        raise NotImplementedError

    def guarded(self, access: Access) -> Transport:
        """
        `security`: Return a broker for a service that requires TLS and a known user, with *access*.

        Each kind of access differs from `granted` in one respect:

        - `granted`: by TLS with a verified certificate, with `password` and every permission that is needed.
        - `unknown authority`: the broker does not trust the authority that signed the service's certificate.
        - `wrong host`: the certificate is for another host than the one that the broker connects to.
        - `expired`: the service's certificate has expired.
        - `plain`: the broker does not use TLS.
        - `wrong password`: of a user that exists.
        - `may not send`: a user with every permission except sending.
        - `may not read`: a user with every permission except reading.

        All brokers that this method returns connect to the same service.

        Raises:
            EnvironmentMissing: This service has no such kind of access. The scenario continues without it.
        """
        raise NotImplementedError
