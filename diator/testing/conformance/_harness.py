"""What somebody who wrote a transport tells the suite about it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

from diator.brokers.base import Topic, Transport
from diator.consumer import Consumer
from diator.testing.fault_proxy import Flow


class EnvironmentMissing(Exception):
    """The service is not to be had on this machine. Nothing was proved, and nothing failed."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A scenario that is known to fail, and why. If it passes, or fails otherwise, that is a failure."""

    reason: str
    raises: type[BaseException] = AssertionError
    issue: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How fast this environment is. All times in seconds."""

    scale: float = float(os.environ.get("DIATOR_CONFORMANCE_SCALE", "1"))
    """What every deadline is multiplied by."""
    quiet: float = 0.1
    """For how long nothing has to come before nothing is coming; only used after a fence, or while held back."""
    redelivery: float = 5.0
    """Within what a delivery comes again that was not settled when its subscription ended."""
    timeout: float = 10.0
    """Within what the transport's calls end, however dead the service is: its `timeout`."""
    liveness: float = 15.0
    """Within what it notices that a silent peer is gone."""
    recovery: float = 10.0
    """Within what it receives again once the service is back."""
    max_delay: float = 30.0
    """The longest pause between two tries to connect again."""
    lag: float = 1.0
    """How late a delivery may be on a machine that is busy, where a scenario is about somebody being held up."""


@dataclass(frozen=True, kw_only=True)
class DeadLettered:
    """What the service has of a message that was put aside."""

    body: bytes
    reason: str


class Proxy(Protocol):
    """
    What stands between a transport and its service, and fails when it is told to. `FaultProxy` is one.

    Where a method takes *flows*, none means both directions.
    """

    @property
    def accepted(self) -> int:
        """How many connections there were."""
        ...

    @property
    def connections(self) -> int:
        """How many connections there are."""
        ...

    @property
    def passed(self) -> Mapping[Flow, int]:
        """How many bytes were passed on."""
        ...

    @property
    def lost(self) -> Mapping[Flow, int]:
        """How many bytes were not, and never will be."""
        ...

    def withhold(self, *flows: Flow) -> None:
        """Keep everything back until `heal`."""

    def black_hole(self, *flows: Flow) -> None:
        """Lose everything, the ends of connections too, and tell nobody."""

    def delay(self, seconds: float, jitter: float) -> None:
        """Pass on each piece later, by *seconds* and up to *jitter* more or less, in its order, until `heal`."""

    def cut_after(self, count: int, flow: Flow) -> None:
        """Break every connection as soon as *count* more bytes have gone in the direction of *flow*, once."""

    def black_hole_existing(self) -> None:
        """Lose everything of the connections that there are, for good. Those to come are as good as ever."""

    def refuse(self) -> None:
        """Refuse new connections until `heal`."""

    def reject(self) -> None:
        """Accept new connections, count them, and break each at once, until `heal`."""

    def cut(self) -> None:
        """End every connection in an orderly way."""

    def reset(self) -> None:
        """Break every connection."""

    async def heal(self) -> None:
        """Pass on and accept everything again."""


class Outages(Protocol):
    """
    A service that belongs to one scenario, and can be broken.

    Each method returns when its effect is there: `start` and `resume` when the service answers, the others when it
    does not. Its address stays the same. To do what was done already is allowed, and does nothing.
    """

    async def stop(self) -> None:
        """End the service in an orderly way, as for an update."""

    async def kill(self) -> None:
        """End its process at once, as SIGKILL does."""

    async def start(self) -> None:
        """Start it again, with the data that it had."""

    async def pause(self) -> None:
        """Freeze it: its connections stay open, and nobody answers."""

    async def resume(self) -> None:
        """Let it go on."""


Access: TypeAlias = Literal[
    "granted", "unknown authority", "wrong host", "expired", "plain", "wrong password", "may not send", "may not read"
]
"""
How a broker comes to a service that is guarded. Each differs from "granted" in one thing only.

- granted: by TLS, whose certificate it verifies, with a password that is right and every right it needs.
- unknown authority: it trusts others than who signed the service's certificate.
- wrong host: the certificate is for another host than the one that it connects to.
- expired: the certificate was good once.
- plain: it does not know that the service speaks TLS.
- wrong password: of a user that there is.
- may not send: a user that may do everything else; may not read: likewise.
"""


class Harness(ABC):
    """
    How to get a transport, and what can be done to its environment.

    A harness is made without arguments. The suite keeps to names of its own, so the service may be shared with others.
    What it cannot do is left as it is here: the scenarios that need it are not run, and the report says so.
    """

    name: ClassVar[str]
    """What the report calls the transport."""
    facilities: ClassVar[frozenset[str]] = frozenset()
    """
    Which of the optional methods below are there, each by the name that its description begins with.

    `raw`, `dead_letters`, `full`, `crash`, `proxy`, `outages`, `operator`, `topology`, `alarm`, `security`; and
    `processes`, for which there is no method: a harness that was made in another process reaches the same service.
    """
    limits: Limits = Limits()
    deviations: Mapping[str, Deviation] = {}
    """By id of the scenario."""
    consumer: ClassVar[type[Consumer]] = Consumer
    """What handles deliveries in the scenarios of both together. Only the proof of the suite has another one."""

    def start(self) -> None:  # noqa: B027  # many have nothing to start
        """
        Bring up the environment, once, before the first scenario.

        Raises:
            EnvironmentMissing: It is not to be had here.
        """

    def stop(self) -> None:  # noqa: B027
        """Take the environment down."""

    def prepare(self, facility: str) -> None:  # noqa: B027
        """
        Bring up what *facility* needs, if it is not there yet: a service that may be broken, its certificates.

        It is called before each scenario that needs *facility*, outside of its event loop and its limit of time. What
        it leaves open may stay open until `stop`.

        Raises:
            EnvironmentMissing: It is not to be had here. The scenario is not run.
        """

    def service(self) -> str:
        """Name the service and its version, for the report."""
        return "in process"

    def driver(self) -> str:
        """Name the client library and its version, for the report; nothing if there is none."""
        return ""

    @abstractmethod
    def transport(self) -> Transport:
        """
        Make a broker that was not used yet. It is called inside a running event loop, several times in a scenario.

        Brokers that promise `multi_process` share one service.
        """

    # -- optional ------------------------------------------------------------------------------------------------

    async def send_raw(self, transport: Transport, topic: Topic, body: bytes) -> None:
        """`raw`: Put *body* where a message of *topic* would be, past the transport's own way of sending."""
        raise NotImplementedError

    async def dead_letters(self, transport: Transport, topic: Topic, group: str | None) -> list[DeadLettered]:
        """
        `dead_letters`: Give what was put aside of *topic* by *group*, as the service has it.

        None is for a subscription without a group. Bodies are given as they were sent, whatever else is kept with them.
        """
        raise NotImplementedError

    def full(self, room: int) -> Transport:
        """`full`: Make a broker whose service takes *room* messages for a topic and refuses the next."""
        raise NotImplementedError

    async def crash(self, transport: Transport) -> None:
        """
        `crash`: Have *transport* and its subscriptions die as with their process.

        From then on nothing is said to the service: no acknowledgement, no goodbye, no new connection. It sees what
        the death of a process looks like: connections that break. What is left of *transport* in this process is
        closed by the scenario, which has to be quick and may not raise.
        """
        raise NotImplementedError

    def proxied(self) -> AbstractAsyncContextManager[Proxy]:
        """
        `proxy`: Put a proxy before the service, and give it. While it is there, `transport` connects through it.

        Inside of `private` it stands before that service. Entered a second time, it gives a second one: who was made
        before keeps the first, so that one side of a conversation can be cut off and the other not.
        """
        raise NotImplementedError

    def private(self) -> AbstractAsyncContextManager[Outages]:
        """
        `outages`: Give a service that nobody else uses. While it is there, `transport` connects to it.

        It is configured as a program should have it that wants to lose nothing. One service may do for all scenarios,
        one after the other: it runs when it is given, and has to when the next one begins, whatever was done to it.
        """
        raise NotImplementedError

    async def disconnect(self, transport: Transport) -> None:
        """
        `operator`: Have the service close all connections of *transport*, as an operator does, and of nobody else.

        *transport* may connect by a proxy.
        """
        raise NotImplementedError

    async def delete(self, transport: Transport, topic: Topic, group: str | None) -> None:
        """
        `topology`: Delete, at the service and past the transport, what a subscription to *topic* needs.

        With *group*: what is the group's alone, such as its queue, or the note of how far it has read. Without: what
        the messages are sent to, such as the topic, the stream or the exchange. What is in it is lost, rightly.
        """
        raise NotImplementedError

    def alarm(self) -> AbstractAsyncContextManager[None]:
        """
        `alarm`: Have the service of `private` run out of memory or disk: it takes no messages until this ends.

        Those who read are served. Only used inside of `private`.
        """
        raise NotImplementedError

    def guarded(self, access: Access) -> Transport:
        """
        `security`: Make a broker for a service that speaks TLS only and lets in only whom it knows, with *access*.

        Every broker that is made by this comes to the same service, and uses `password` where that is right.

        Raises:
            EnvironmentMissing: This service knows no such difference. The scenario goes on without it.
        """
        raise NotImplementedError

    password: str = ""
    """`security`: The right one. It may be seen nowhere; so it is a word that is seen nowhere by chance."""
