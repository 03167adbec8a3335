"""What is said about a message that was put aside, on every transport in the same words."""

from __future__ import annotations

from datetime import UTC, datetime


def provenance(reason: str, *, source: str, entry_id: str, group: str, attempts: int) -> dict[str, str]:
    """Give the headers that a dead letter has beside its own: why it is there, and where it comes from."""
    return {
        "diator-dlq-version": "1",
        "diator-dlq-reason": reason,
        "diator-dlq-source": source,
        "diator-dlq-entry-id": entry_id,
        "diator-dlq-consumer-group": group,
        "diator-dlq-attempts": str(attempts),
        "diator-dlq-last-failed-at": datetime.now(UTC).isoformat(),
    }
