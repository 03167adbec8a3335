"""What exchanges, routing keys and queues of RabbitMQ are called."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from diator.brokers.base import Topic
from diator.exceptions import EncodingError

_LONGEST = 255
_LONGEST_SUFFIX = len(":retry:4294967295")


@lru_cache(maxsize=1024)
def routing_key(message_type: str, message_name: str) -> str:
    """Keep what has a meaning in a binding from having one, and the kind to one word. Raises `EncodingError`."""
    key = f"{_quoted(message_type, '%*#.')}.{_quoted(message_name, '%*#')}"
    if len(key.encode()) > _LONGEST:
        raise EncodingError(f"{message_name:.80}…", f"RabbitMQ takes routing keys of {_LONGEST} bytes")
    return key


def queue_name(prefix: str, topic: Topic, group: str) -> str:
    """Name a queue so that no two of different parts have one name. Raises `EncodingError`."""
    queue = ":".join(UNUSUAL.sub(_escaped, part) for part in (prefix, *topic, group))
    if len(queue.encode()) > _LONGEST - _LONGEST_SUFFIX:
        raise EncodingError(
            f"{topic.message_name:.80}…", f"with its group it makes a name of more than {_LONGEST} bytes"
        )
    return queue


UNUSUAL = re.compile("[^a-zA-Z0-9_./@,+ -]")
"""What aiormq allows in the name of a queue has `#` and `:` beside these, which have a meaning here."""


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"#{byte:02X}" for byte in found[0].encode())


def _quoted(text: str, characters: str) -> str:
    for character in characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)


def delay_bucket(seconds: float) -> int:
    """Round up, by a third at most, to milliseconds that many retries have in common: each takes a queue."""
    milliseconds = math.ceil(seconds * 1000)
    magnitude = int(10 ** (len(str(milliseconds)) - 1))
    buckets = (-(-step * magnitude // 10) for step in _STEPS)
    return next(delay_bucket for delay_bucket in buckets if delay_bucket >= milliseconds)
