"""
What tests need: of a program that sends and consumes, and of a transport that somebody wrote.

For a program: `FaultyMessageBroker`, a broker inside the process that loses, repeats and refuses as it is told to by
`diator.testing.faults`, and `Recorder`, which knows what was sent. They need no extra.

For a transport, with the extra `testing`: `diator.testing.conformance` proves that it keeps the contract of
`diator.brokers.base`, `diator.testing.fault_proxy` breaks its connections, and `diator.testing.saboteurs` prove that
the proof is worth something.
"""

from diator.testing.faults import FaultyMessageBroker
from diator.testing.recorder import Recorder

__all__ = ["FaultyMessageBroker", "Recorder"]
