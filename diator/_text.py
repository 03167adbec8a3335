"""Text for messages that people read."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: The most characters of a text for a log line, or for the reason of a dead letter.
MAX_CHARACTERS = 1024
_MAX_NAMES = 3
_URL = re.compile(r"//\S*?(?=,\w+://|\s|$)")


def listed(names: Sequence[str]) -> str:
    """Return the first *names* as one text, and how many more there are."""
    further = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{', '.join(names[:_MAX_NAMES])}{further}"


def counted(count: int, one: str, many: str = "") -> str:
    """Return *count* with its noun, as in `1 message` and `2 messages`. *many* is by default *one* and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def printable(text: str) -> str:
    """
    Return *text* as one line that is safe in a log, a header and a terminal.

    Whatever is not printable is escaped: control characters, line breaks, marks that change the direction of the text,
    lone surrogates. A text of more than 1,024 characters is cut, and ends in an ellipsis.
    """
    if len(text) <= MAX_CHARACTERS and text.isprintable():
        return text
    start = text[: MAX_CHARACTERS + 1]  # escaping makes no text shorter, so the rest would be cut anyway
    escaped = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in start)
    return escaped if len(escaped) <= MAX_CHARACTERS else f"{escaped[: MAX_CHARACTERS - 1]}…"


def without_credentials(text: str) -> str:
    """Return *text* without the user and the password of any URL in it."""
    # The last @ ends the credentials: a password may contain one, and a slash, that should have been escaped.
    return _URL.sub(lambda url: f"//{url[0].removeprefix('//').rpartition('@')[2]}", text)


def explained(error: BaseException, *, within: float | None = None) -> str:
    """
    Describe an error of a client library in one line that is never empty and shows no credentials.

    *within* is the time limit in seconds, if there was one.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    name, text = type(error).__name__, printable(" ".join(without_credentials(str(error)).split()))
    if not text and isinstance(error, TimeoutError):
        return "no answer in time" if within is None else f"no answer within {within:g} s"
    if text.startswith(name):  # as the errors of aiokafka do
        return text
    return f"{name}: {text}" if text else name
