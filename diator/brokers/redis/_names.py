"""The names of channels and keys. Two different destinations never have one name, whatever their parts contain."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote

from diator.brokers.names import escaped
from diator.exceptions import ConfigurationError

# A program sends to a few topics many times. Senders pass a plain tuple: a Topic takes longer to make than to look up.
_CACHED = 4096

_UNSAFE = re.compile("[%:]")
AGAIN, DELAYED, DEAD = b"again", b"delayed", b"dead"


def encoded(text: str) -> bytes:
    """Return *text* as Redis stores it. ConfigurationError if it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{text!a:.80} is not valid Unicode (a lone surrogate); use another name") from None


@lru_cache(_CACHED)
def stream(prefix: str, topic: tuple[str, str]) -> bytes:
    """Return the key of the stream of *topic*. Its parts contain no colon, so it has two."""
    return encoded(":".join(escaped(part, _UNSAFE, "%") for part in (prefix, *topic)))


def of_group(stream: bytes, group: str, what: bytes) -> bytes:
    """Return the key of what *group* has for *stream*. It has four colons, so it is not the stream of a topic."""
    return b"%b:%b:%b" % (stream, encoded(escaped(group, _UNSAFE, "%")), what)


@lru_cache(_CACHED)
def channel(prefix: str, topic: tuple[str, str]) -> bytes:
    """
    Return the channel of *topic*: the one that diator has always used, unless a part of the topic contains a colon.

    In that case the channel has no colon at all, so that it is not one of the others.
    """
    kind, name = topic
    if ":" not in kind and ":" not in name:
        return encoded(f"{prefix}:{kind}:{name}")
    encoded(f"{prefix}{kind}{name}")
    return "/".join(quote(part, safe="") for part in (prefix, kind, name)).encode()


def channels_of(prefix: str, message_type: str) -> tuple[bytes, bytes]:
    """Return a pattern for the channels of diator 0.1, which end in the id of the message, and what they begin with."""
    start = encoded(f"{prefix}:{message_type}:")
    return re.sub(rb"([*?\[\]\\])", rb"\\\1", start) + b"*", start
