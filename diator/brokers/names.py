"""Names and headers for a service that allows only some characters or lengths. Different texts stay different."""

from __future__ import annotations

import re
from hashlib import sha256

_HASH = 40  # hexadecimal digits: 160 bits, so that nobody finds two texts with one name


def escaped(text: str, unsafe: re.Pattern[str], mark: str, digits: str = "02X") -> str:
    """
    Return *text* with *mark* and two hexadecimal *digits* in place of each byte of what *unsafe* matches.

    If *unsafe* matches *mark* too, different texts stay different, and `unescaped` is the inverse.

    Raises:
        UnicodeEncodeError: A match is not valid Unicode.
    """
    return unsafe.sub(lambda found: "".join(f"{mark}{byte:{digits}}" for byte in found[0].encode()), text)


def unescaped(text: str, mark: str) -> str:
    """Return the text that `escaped` was called with. What it could not have written stays, as far as it can."""
    run = re.compile(rf"(?:{re.escape(mark)}[0-9A-Fa-f]{{2}})+")
    return run.sub(lambda found: bytes.fromhex(found[0].replace(mark, "")).decode(errors="replace"), text)


def shortened(name: str, longest: int, mark: str) -> str:
    """
    Return *name* if it has at most *longest* bytes, and otherwise its beginning, *mark*, and a hash of the whole name.

    Two names stay different if *mark* is in none of them: after `escaped`, its mark twice in a row.
    """
    encoded = name.encode()
    if len(encoded) <= longest:
        return name
    beginning = encoded[: longest - len(mark.encode()) - _HASH].decode(errors="ignore")
    return f"{beginning}{mark}{sha256(encoded).hexdigest()[:_HASH]}"
