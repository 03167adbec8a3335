"""Sends and receives messages of diator through PostgreSQL."""

from diator_postgres.broker import PostgresMessageBroker

__all__ = ["PostgresMessageBroker"]
