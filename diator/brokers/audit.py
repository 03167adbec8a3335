"""What in a running service weakens what a transport promises: asked when a program starts, not after the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from diator.brokers.capabilities import Capabilities


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One setting of the service, as it was found."""

    capability: str
    """Which promise suffers: the name of a field of `Capabilities`."""
    problem: str
    """What is set how, and what can happen because of it. No secrets."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.capability}: {self.problem}; {self.remedy}"


@runtime_checkable
class Auditable(Protocol):
    """A broker whose service can be looked into."""

    async def audit(self) -> Sequence[Finding]:
        """
        Look into the service, changing nothing, and tell what is set otherwise than it should be.

        What may not be looked at, for want of a permission, is a finding too.

        Raises:
            BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
            BrokerClosed: This broker was closed.
        """
        ...


async def audit(broker: object, *, requires: Capabilities | None = None) -> list[Finding]:
    """
    Tell what in the service that *broker* is connected to weakens its promises; nothing, where all is well.

    With *requires*, only what concerns something that it asks for. A broker that is not `Auditable`, as the one in
    memory, has no service to look into, and no findings.

    Raises:
        BrokerUnavailable: The service cannot be reached within the broker's `timeout`.
        BrokerClosed: The broker was closed.
    """
    found = await broker.audit() if isinstance(broker, Auditable) else ()
    asked = {field.name for field in fields(Capabilities) if requires and _asks(requires, field.name)}
    return [finding for finding in found if requires is None or finding.capability in asked]


def _asks(requires: Capabilities, name: str) -> bool:
    return bool(getattr(requires, name) != getattr(Capabilities(), name))
