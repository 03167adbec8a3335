"""
Transports with exactly one defect each, which prove that the conformance suite finds the defect.

Each saboteur is the in-memory broker with one defect, and names the scenarios that have to fail because of it. The
tests of diator run all of them. Every new scenario needs a saboteur that it catches.
"""

from diator.testing.saboteurs import (
    consume,
    content,
    contract,
    crash,
    foreign,
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
    "foreign",
    "groups",
    "lifecycle",
    "manners",
    "order",
    "publish",
    "settle",
    "subscribe",
]
