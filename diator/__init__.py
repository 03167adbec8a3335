"""
A CQRS mediator whose events travel through any message broker.

The module paths say where things live; nothing is re-exported here:

- `diator.mediator` sends requests, `diator.requests` and `diator.events` define and handle them;
- `diator.brokers` holds the contract of a message broker and the in-memory one, and one module a transport;
- `diator.container` and `diator.middlewares` hold what surrounds a handler;
- `diator.exceptions` holds every error.
"""

__version__ = "1.0.0.dev0"
