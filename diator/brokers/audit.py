"""
Check a running service for settings that weaken a promise of its transport.

A program runs the audit when it starts, so that it detects such a setting before a message is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from diator.brokers.capabilities import Capabilities


@dataclass(frozen=True, kw_only=True)
class Finding:
    """
    A setting of the service that weakens a promise.

    Attributes:
        capability: The promise that is weakened: the name of a field of `Capabilities`.
        problem: Which setting has which value, and what can happen because of it. It contains no secrets.
        remedy: What to change.
    """

    capability: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.capability}: {self.problem}; {self.remedy}"


@runtime_checkable
class Auditable(Protocol):
    """A broker that can check the settings of its service."""

    async def audit(self) -> Sequence[Finding]:
        """
        Return the settings of the service that weaken a promise. Change nothing in the service.

        A setting that this user is not permitted to read is a finding as well.

        Raises:
            BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
            BrokerClosed: The broker was closed.
        """
        ...


async def audit(broker: object, *, requires: Capabilities | None = None) -> list[Finding]:
    """
    Return the settings of *broker*'s service that weaken its promises; an empty list if there are none.

    With *requires*, return only the findings about capabilities that *requires* asks for. A broker that is not
    `Auditable`, such as the one in memory or that of Redis Pub/Sub, has nothing to check and so no findings. An empty
    list does not prove that the broker makes a promise: `Consumer(requires=…)` checks this.

    Raises:
        BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
        BrokerClosed: The broker was closed.
    """
    # Not `isinstance`: since Python 3.12 it does not see what a wrapping broker passes on by `__getattr__`.
    ask: Callable[[], Awaitable[Sequence[Finding]]] | None = getattr(broker, "audit", None)
    found = () if ask is None else await ask()
    needed = {field.name for field in fields(Capabilities) if requires and _is_needed(requires, field.name)}
    return [finding for finding in found if requires is None or finding.capability in needed]


def _is_needed(requires: Capabilities, name: str) -> bool:
    return bool(getattr(requires, name) != getattr(Capabilities(), name))
