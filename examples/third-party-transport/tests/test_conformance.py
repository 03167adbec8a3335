"""Every promise of the transport, proved by the suite of diator."""

from diator_postgres_harness import PostgresHarness

from diator.testing.conformance import TransportConformance


class TestPostgres(TransportConformance):
    harness = PostgresHarness
