"""The catalogue of scenarios, one module for each part. Importing the modules registers the scenarios."""

from diator.testing.outbox.scenarios import (
    claims,
    content,
    dead,
    due,
    inbox,
    keys,
    processes,
    status,
    transaction,
    use,
    wake,
    watermark,
)

__all__ = [
    "claims",
    "content",
    "dead",
    "due",
    "inbox",
    "keys",
    "processes",
    "status",
    "transaction",
    "use",
    "wake",
    "watermark",
]
