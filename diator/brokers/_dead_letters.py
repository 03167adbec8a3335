"""What is said about a message that was put aside, by every transport that has a place of its own for it."""

from __future__ import annotations

from datetime import UTC, datetime

_LONGEST_REASON = 1024


def provenance(*, reason: str, source: str, entry_id: str, group: str, attempts: int) -> dict[str, str]:
    """Say, in headers, where a message comes from and why it is here. The message itself stays as it was."""
    return {
        "diator-dlq-version": "1",
        "diator-dlq-reason": reason[:_LONGEST_REASON],
        "diator-dlq-source": source,
        "diator-dlq-entry-id": entry_id,
        "diator-dlq-consumer-group": group,
        "diator-dlq-attempts": str(attempts),
        "diator-dlq-last-failed-at": datetime.now(UTC).isoformat(),
    }
