"""Names in a sentence that somebody is to read."""

from __future__ import annotations

from collections.abc import Sequence

_MOST = 3


def listed(names: Sequence[str]) -> str:
    """Give the first of *names*, and how many more there are."""
    further = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{', '.join(names[:_MOST])}{further}"
