"""Names of Kafka topics and groups."""

from __future__ import annotations

import re

from diator.brokers.base import Topic
from diator.exceptions import ConfigurationError, MessageRejected

RETRY, DEAD = "-retry", "-dlq"
_LONGEST_NAME = 249


class Names:
    """
    The topics of one prefix: `<prefix>.<message_type>.<message_name>`, and those of each group beside it.

    Kafka allows letters, digits, `.`, `_` and `-`. Everything else, and `-` itself, is written as `-` and two
    hexadecimal digits for each byte, so that different names stay apart. A `.` is allowed in the name of a message
    only: elsewhere it ends a part.
    """

    def __init__(self, prefix: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", prefix):
            raise ConfigurationError(
                "a prefix has letters, digits, `.`, `_` and `-` only: it begins the names of Kafka topics"
            )
        self.prefix = prefix
        self._known: dict[Topic, str] = {}

    def topic(self, topic: Topic) -> str:
        """Name the topic that has the messages of *topic*. MessageRejected if Kafka has no room for that name."""
        name = self._known.get(topic)
        if name is None:
            name = f"{self.prefix}.{_escaped(topic.message_type, '_')}.{_escaped(topic.message_name, '._')}"
            self._known[topic] = _checked(name)
        return name

    def group(self, group: str) -> str:
        """Name a group: two prefixes of one cluster, such as those of two environments, must not disturb each other."""
        return f"{self.prefix}.{group}"

    def beside(self, topic: str, group: str | None, what: str) -> str:
        """Name what a group has beside *topic*: `RETRY` or `DEAD`. No message can have such a name."""
        return _checked(f"{topic}.{_escaped(group, '_')}{what}" if group is not None else f"{topic}{what}")


def _escaped(text: str, allowed: str) -> str:
    plain = re.compile(rf"[A-Za-z0-9{re.escape(allowed)}]")
    try:
        return "".join(
            each if plain.match(each) else "".join(f"-{byte:02x}" for byte in each.encode()) for each in text
        )
    except UnicodeEncodeError as error:
        raise MessageRejected(f"a name is no valid Unicode ({error.reason})") from error


def _checked(name: str) -> str:
    if len(name) > _LONGEST_NAME:
        raise MessageRejected(f"its topic would be {name[:60]}…, {len(name)} characters; Kafka allows {_LONGEST_NAME}")
    return name
