"""What somebody who wrote a transport tells the suite about it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from diator.brokers.base import ReadableBroker, Topic
from diator.consumer import Consumer


class Transport(ReadableBroker, Protocol):
    """A broker that can be read from and closed, which is what the suite tests."""

    async def aclose(self) -> None:
        """Give up what it holds. Calling it again does nothing."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> bool | None: ...


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
    settle: float = 0.1
    """For how long nothing has to come before nothing is coming; only used after a fence, or while held back."""
    redelivery: float = 5.0
    """Within what a delivery comes again that was not settled when its subscription ended."""
    timeout: float = 10.0
    """Within what the transport's calls end, however dead the service is: its `timeout`."""
    liveness: float = 15.0
    """Within what it notices that a silent peer is gone."""
    recovery: float = 10.0
    """Within what it receives again once the service is back."""
    lag: float = 1.0
    """How late a delivery may be on a machine that is busy, where a scenario is about somebody being held up."""


@dataclass(frozen=True, kw_only=True)
class DeadLettered:
    """What the service has of a message that was put aside."""

    body: bytes
    reason: str


class Proxy(Protocol):
    """What stands between a transport and its service, and fails when it is told to."""

    @property
    def accepted(self) -> int:
        """How many connections there were."""
        ...

    @property
    def connections(self) -> int:
        """How many connections there are."""
        ...

    def withhold(self) -> None:
        """Keep everything back until `heal`."""

    def black_hole(self) -> None:
        """Lose everything, and tell nobody."""

    def refuse(self) -> None:
        """Refuse new connections until `heal`."""

    def cut(self) -> None:
        """End every connection in an orderly way."""

    def reset(self) -> None:
        """Break every connection."""

    async def heal(self) -> None:
        """Pass on and accept everything again."""


class Harness(ABC):
    """
    How to get a transport, and what can be done to its environment.

    A harness is made without arguments. The suite keeps to names of its own, so the service may be shared with others.
    What it cannot do is left as it is here: the scenarios that need it are not run, and the report says so.
    """

    name: ClassVar[str]
    """What the report calls the transport."""
    facilities: ClassVar[frozenset[str]] = frozenset()
    """Which of the optional methods below are there: `raw`, `dead_letters`, `full`, `crash`, `proxy`."""
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

    def service(self) -> str:
        """Name the service and its version, for the report."""
        return "in process"

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
        """`dead_letters`: Give what was put aside of *topic* by *group*, as the service has it."""
        raise NotImplementedError

    def full(self, room: int) -> Transport:
        """`full`: Make a broker whose service takes *room* messages for a topic and refuses the next."""
        raise NotImplementedError

    async def crash(self, transport: Transport) -> None:
        """`crash`: Have *transport* and its subscriptions die as with their process: nothing is said to the service."""
        raise NotImplementedError

    def proxied(self) -> AbstractAsyncContextManager[Proxy]:
        """`proxy`: Put a proxy before the service, and give it. While it is there, `transport` connects through it."""
        raise NotImplementedError
