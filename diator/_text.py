"""Text for messages that people read."""

from __future__ import annotations

from collections.abc import Sequence

_LIMIT = 3


def listed(names: Sequence[str]) -> str:
    """Return the first *names* as one text, and how many more there are."""
    further = f" and {len(names) - _LIMIT} more" if len(names) > _LIMIT else ""
    return f"{', '.join(names[:_LIMIT])}{further}"
