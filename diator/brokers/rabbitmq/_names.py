"""The names of exchanges, routing keys and queues of RabbitMQ."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from diator.brokers.base import Topic
from diator.brokers.names import escaped

_LONGEST = 255
_IN_WORD, _IN_WORDS = re.compile("[%*#.]"), re.compile("[%*#]")
_LONGEST_SUFFIX = len(":retry:4294967295")


@lru_cache(maxsize=1024)
def routing_key(message_type: str, message_name: str) -> str:
    """Return a routing key without wildcards, whose first word is the type. ValueError if RabbitMQ takes none such."""
    key = f"{escaped(message_type, _IN_WORD, '%')}.{escaped(message_name, _IN_WORDS, '%')}"
    if len(key.encode()) > _LONGEST:
        raise ValueError(f"its routing key would have more than {_LONGEST} bytes")
    return key


def queue_name(prefix: str, topic: Topic, group: str) -> str:
    """Return the name of a group's queue, which no queue of other parts has. ValueError if RabbitMQ takes none such."""
    return _joined(prefix, topic, escaped(group, _GROUP, "#"))


def own_queue_name(prefix: str, topic: Topic, purpose: str) -> str:
    """Return the name of a queue of diator that belongs to no group. ValueError if RabbitMQ takes none such."""
    return _joined(prefix, topic, f"/{purpose}")


def retained_queue_name(prefix: str, topic: Topic) -> str:
    """Return the name of the queue that retains the messages of *topic* until a group subscribes."""
    return own_queue_name(prefix, topic, "retained")


def retained_exchange_name(prefix: str) -> str:
    """Return the name of the exchange that routes what the topic exchange cannot route."""
    return f"{prefix}:retained"


def _joined(prefix: str, topic: Topic, last: str) -> str:
    queue = ":".join((prefix, *(escaped(part, UNUSUAL, "#") for part in topic), last))
    if len(queue.encode()) > _LONGEST - _LONGEST_SUFFIX:
        raise ValueError(f"the names of its queues would have more than {_LONGEST} bytes")
    return queue


# aiormq also allows `#` and `:` in the name of a queue; here they have a meaning.
UNUSUAL = re.compile("[^a-zA-Z0-9_./@,+ -]")
# What begins with a slash in place of a group belongs to none.
_GROUP = re.compile(f"^/|{UNUSUAL.pattern}")


_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)


def delay_bucket(seconds: float) -> int:
    """Return *seconds* in milliseconds, rounded up by a third at most, so that many retries share few queues."""
    milliseconds = math.ceil(seconds * 1000)
    magnitude = int(10 ** (len(str(milliseconds)) - 1))
    buckets = (-(-step * magnitude // 10) for step in _STEPS)
    return next(bucket for bucket in buckets if bucket >= milliseconds)
