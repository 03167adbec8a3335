"""The conformance suite of diator proves every promise of the transport."""

from diator_postgres_harness import PostgresHarness

from diator.testing.conformance import TransportConformance


class TestPostgres(TransportConformance):
    harness = PostgresHarness
