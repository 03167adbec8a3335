"""Messages of diator in PostgreSQL."""

from diator_postgres.broker import PostgresMessageBroker

__all__ = ["PostgresMessageBroker"]
