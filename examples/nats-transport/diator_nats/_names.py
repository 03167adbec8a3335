"""The names of topics and groups in NATS: two of them never have the same one."""

from __future__ import annotations

import re

from diator.brokers.names import escaped, shortened

_UNSAFE = re.compile("[^A-Za-z0-9_-]+")
_LONGEST = 150  # NATS takes 4096 bytes for a subject with its reply subject


def subject_of(prefix: str, *parts: str) -> str:
    return ".".join([prefix, *(shortened(escaped(part, _UNSAFE, "="), _LONGEST, "==") or "==" for part in parts)])


def consumer_of(*parts: str) -> str:
    return shortened("=_".join(escaped(part, _UNSAFE, "=") for part in parts), _LONGEST, "==")
