"""A transport of diator for NATS JetStream."""

from diator_nats.broker import NatsMessageBroker

__all__ = ["NatsMessageBroker"]
