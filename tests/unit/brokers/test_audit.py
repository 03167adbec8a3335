"""An audit returns the findings of a broker, limited to the capabilities that a program requires."""

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
async def test_only_findings_about_required_capabilities_are_returned(requires, expected):
    assert await audit(Audited(), requires=requires) == expected


async def test_a_broker_without_a_service_has_no_findings():
    assert await audit(MemoryMessageBroker()) == []


def test_a_finding_reads_as_one_sentence():
    assert str(STORED) == "durability: nothing is stored; set appendonly yes"
