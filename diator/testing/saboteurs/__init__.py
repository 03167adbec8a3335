"""
Transports with exactly one defect each: the proof that the conformance suite would find it.

Each is the broker inside the process with something done wrong, and names the scenarios that have to fail for it. The
tests of diator run them all; whoever adds a scenario adds the transport that it is there to catch.
"""

from diator.testing.saboteurs import (
    consume,
    content,
    contract,
    crash,
    groups,
    lifecycle,
    manners,
    order,
    publish,
    settle,
    subscribe,
)
from diator.testing.saboteurs._base import SABOTEURS, Saboteur

__all__ = [  # plainly sorted
    "SABOTEURS",
    "Saboteur",
    "consume",
    "content",
    "contract",
    "crash",
    "groups",
    "lifecycle",
    "manners",
    "order",
    "publish",
    "settle",
    "subscribe",
]
