"""
Tools for tests of a program that sends and consumes, and for tests of a transport.

For a program: `FaultyMessageBroker` is an in-memory broker that loses, duplicates and refuses messages as a test
scripts it with `diator.testing.faults`. `Recorder` records what was sent. Both need no extra.

For a transport, with the extra `testing`: `diator.testing.conformance` proves that it keeps the contract of
`diator.brokers.base`, `diator.testing.fault_proxy` breaks its connections, and `diator.testing.servers` starts and
kills its service. `diator.testing.saboteurs` are broken transports that prove that the suite finds defects.
"""

from diator.testing.faults import FaultyMessageBroker
from diator.testing.recorder import Recorder

__all__ = ["FaultyMessageBroker", "Recorder"]
