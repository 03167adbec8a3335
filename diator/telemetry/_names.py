"""What both instruments call the same: destinations, services, and kinds of reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from diator._hints import described
from diator.brokers.message import Topic
from diator.consumer import Consumer, Health
from diator.exceptions import ConfigurationError
from diator.instruments import OutboxState

_ADDRESS = re.compile(r"(?:[a-z+]+://)?(\[[^]\s]+\]|[^/:,\s]+)(?::(\d+))?(?=[/,]|$)")


def destination_of(topic: Topic) -> str:
    """Return the name of a destination. It is that of diator: each service has its own way to write it."""
    return f"{topic.message_type}.{topic.message_name}"


def system_of(broker: object) -> str:
    """Return the name of the service of *broker*; that of its class for a broker that does not tell."""
    return str(getattr(broker, "messaging_system", None) or type(broker).__name__)


def where_of(broker: object) -> str:
    """Return the address of the service of *broker*; empty for a broker that does not tell."""
    return str(getattr(broker, "where", ""))


def address_of(where: str) -> tuple[str | None, int | None]:
    """Return the host and the port in an address, the first one if there are several; None if there is none."""
    found = _ADDRESS.match(where)
    if found is None:
        return None, None
    return found[1].strip("[]"), int(found[2]) if found[2] else None


def kind_of(reason: str | None) -> str:
    """Return the fixed word at the beginning of a reason; empty if there is none."""
    word = (reason or "").partition(":")[0]
    return "ended" if word.startswith("ended by ") else word


def check_consumers(consumers: Mapping[str, object]) -> None:
    """Check what a program wants to watch, before the metrics are read."""
    for name, each in consumers.items():
        if not isinstance(each, Consumer):
            raise ConfigurationError(f"watch({name}=…) must have a Consumer, and it is {described(each)}")


class Figure(NamedTuple):
    """
    A figure of a consumer's health, or of the state of an outbox.

    Attributes:
        name: The name of the attribute of `Health` or `OutboxState`, in the metric too.
        unit: Its unit for OpenTelemetry.
        meaning: One sentence for people.
        only_grows: Whether it is a count that only grows.
    """

    name: str
    unit: str
    meaning: str
    only_grows: bool = False

    def of(self, state: Health | OutboxState) -> float | None:
        """Return its value; None if the transport does not know."""
        value: float | None = getattr(state, self.name)
        return None if value is None else float(value)


HEALTH = (
    Figure("receiving", "1", "Whether the consumer has subscribed and was not stopped."),
    Figure("connected", "1", "Whether the subscription is connected."),
    Figure("reconnects", "{reconnect}", "How often the subscription had to reconnect.", only_grows=True),
    Figure("gaps", "{gap}", "How often messages may have been missed.", only_grows=True),
    Figure("unsettled", "{delivery}", "How many deliveries could not be settled.", only_grows=True),
    Figure("since_last_progress", "s", "For how long deliveries have been there and none was settled."),
    Figure("oldest_in_flight", "s", "For how long the oldest delivery has been handled."),
    Figure("oldest_message", "s", "The age of the oldest message that was received and is not settled."),
)

OUTBOX = (
    Figure("pending", "{message}", "How many messages are due and not sent yet."),
    Figure("oldest", "s", "For how long the oldest of them has been due."),
    Figure("scheduled", "{message}", "How many messages wait for their time."),
    Figure("dead", "{message}", "How many messages are dead."),
    Figure("blocked", "{message}", "How many messages wait behind a dead one with their key."),
    Figure("blocked_keys", "{key}", "How many keys have a dead message."),
    Figure("held_back", "{message}", "How many messages wait for an open transaction of the database."),
    Figure("held_back_for", "s", "For how long that transaction has been open."),
    Figure(
        "lease_lost", "{message}", "How many messages had lost their lease when they were finished.", only_grows=True
    ),
)
