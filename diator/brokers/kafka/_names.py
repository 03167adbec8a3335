"""Names of Kafka topics and groups."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diator.brokers.base import Topic
from diator.brokers.names import escaped
from diator.exceptions import ConfigurationError, MessageRejected

RETRY, DEAD = "-retry", "-dlq"
_LONGEST_NAME = 249
_IN_PART, _IN_NAME = re.compile("[^A-Za-z0-9_]"), re.compile("[^A-Za-z0-9._]")


class Names:
    """
    The names of the topics of one prefix: `<prefix>.<message_type>.<message_name>`, and of each group's own topics.

    Kafka allows letters, digits, `.`, `_` and `-`. Any other character, and `-` itself, becomes `-` and two hexadecimal
    digits for each of its bytes, so that different names stay different. A `.` stays only in the name of a message:
    elsewhere it separates two parts.
    """

    def __init__(self, prefix: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", prefix):
            raise ConfigurationError(
                "prefix must have only letters, digits, `.`, `_` and `-`: the names of Kafka topics begin with it"
            )
        self.prefix = prefix
        self._known: dict[Topic, str] = {}

    def topic(self, topic: Topic) -> str:
        """Return the name of *topic* in Kafka. MessageRejected if the name is too long for Kafka."""
        name = self._known.get(topic)
        if name is None:
            name = f"{self.prefix}.{_escaped(topic.message_type, _IN_PART)}.{_escaped(topic.message_name, _IN_NAME)}"
            self._known[topic] = _checked(name)
        return name

    def group(self, group: str) -> str:
        """Return the name of *group* in Kafka. It has the prefix, so that two environments can share a cluster."""
        return f"{self.prefix}.{group}"

    def beside(self, topic: str, group: str | None, what: str) -> str:
        """Return the name of a group's own topic beside *topic*: *what* is `RETRY` or `DEAD`."""
        return _checked(f"{topic}.{_escaped(group, _IN_PART)}{what}" if group is not None else f"{topic}{what}")


def is_of_group(name: str) -> bool:
    """Return whether *name* is one that `Names.beside` returns."""
    return name.endswith((RETRY, DEAD))


def possible_sources(name: str) -> Sequence[str]:
    """Return the topics that the topic *name* of a group can be beside: a subscription may have no group."""
    return (name.rpartition(".")[0], name.removesuffix(DEAD).removesuffix(RETRY))


def _escaped(text: str, unsafe: re.Pattern[str]) -> str:
    try:
        return escaped(text, unsafe, "-", "02x")
    except UnicodeEncodeError as error:
        raise MessageRejected(f"a name is not valid Unicode ({error.reason})") from error


def _checked(name: str) -> str:
    if len(name) > _LONGEST_NAME:
        raise MessageRejected(f"its topic would be {name[:60]}…, {len(name)} characters; Kafka allows {_LONGEST_NAME}")
    return name
