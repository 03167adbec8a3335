"""
A CQRS mediator that sends integration events through any message broker.

Import names from these modules; this package re-exports none of them:

- `diator.mediator` sends requests to their handlers; `diator.consumer` receives events from a message broker.
- `diator.context` has the context of the message that a consumer handles; `diator.instruments` observe all of it.
- `diator.requests` and `diator.events` have the base classes of messages and handlers, and bind one to the other.
- `diator.brokers` has the contract of a message broker, the in-memory broker, and one module for each service.
- `diator.container` builds handlers; `diator.middlewares` surround them; `diator.retrying` retries them.
- `diator.exceptions` has every error.
- `diator.testing` tests programs and message brokers.
"""

__version__ = "1.0.0.dev0"
