"""The audit gives what a broker finds, and of that what a program asked about."""

import pytest

from diator.brokers.audit import Finding, audit
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker

STORED = Finding(capability="durability", problem="nothing is stored", remedy="set appendonly yes")
KEPT = Finding(capability="guarantee", problem="unread messages may be evicted", remedy="set noeviction")


class Audited:
    async def audit(self):
        return [STORED, KEPT]


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        (None, [STORED, KEPT]),
        (Capabilities(), []),
        (Capabilities(durability="restart"), [STORED]),
        (Capabilities(guarantee="at_least_once", ordering="key"), [KEPT]),
    ],
)
async def test_findings_are_those_that_concern_what_was_asked_for(requires, expected):
    assert await audit(Audited(), requires=requires) == expected


async def test_what_has_no_service_has_no_findings():
    assert await audit(MemoryMessageBroker()) == []


def test_a_finding_reads_as_one_sentence():
    assert str(STORED) == "durability: nothing is stored; set appendonly yes"
