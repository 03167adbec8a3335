"""Which messages of one partition are done: the arithmetic of committing, without a client and a clock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

BESIDE_A_COMMIT = 4_096
"""How many characters Kafka takes beside a commit: the default of `offset.metadata.max.bytes`, and all that is used."""
_VERSION = "1"


class Offsets:
    """
    The messages of one partition, from the oldest one that is not finished.

    They are taken in the order of their offsets and finished in any. What is committed is the lowest offset that is not
    finished, never the newest that is; what was finished above it, and how often what was not was tried, is written
    beside the commit, so that it outlives a change of members. Offsets that nobody takes (a compacted topic has holes)
    count as finished.
    """

    def __init__(self, position: int, written: str = "") -> None:
        self._next = position
        self._unfinished: dict[int, int] = {}  # in the order of their offsets, each with its attempt
        self._done, self._attempts = _read(position, written)

    @property
    def next(self) -> int:
        """The offset that is expected next."""
        return self._next

    @property
    def lowest(self) -> int:
        """The lowest offset that is not finished."""
        return next(iter(self._unfinished), self._next)

    @property
    def spread(self) -> int:
        """How far the newest one that was taken is ahead of the lowest that is not finished."""
        return self._next - self.lowest

    def take(self, offset: int) -> int:
        """Note that the message at *offset* has come, and give its attempt; 0 if it was taken, or finished, before."""
        if offset < self._next:
            return 0
        self._next = offset + 1
        if self._done:
            while self._done and self._done[0].stop <= offset:
                del self._done[0]
            if self._done and offset in self._done[0]:
                return 0
        attempt = self._attempts.pop(offset, 1) if self._attempts else 1
        self._unfinished[offset] = attempt
        return attempt

    def finish(self, offset: int) -> None:
        """It must not come again."""
        self._unfinished.pop(offset, None)

    def give_back(self, offset: int) -> int:
        """It is to come again; give the attempt that this will be."""
        self._unfinished[offset] += 1
        return self._unfinished[offset]

    def attempt(self, offset: int) -> int:
        """Which attempt the message at *offset* is at, which was taken and is not finished."""
        return self._unfinished.get(offset, 1)

    def progress(self) -> tuple[int, str]:
        """What is to be committed: the lowest offset that is not finished, and what is written beside it."""
        lowest = self.lowest
        attempts = {offset: attempt for offset, attempt in self._unfinished.items() if attempt > 1}
        return lowest, _write(lowest, [*self._finished_above()], {**attempts, **self._attempts})

    def _finished_above(self) -> Iterator[range]:
        expected = None
        for offset in self._unfinished:
            if expected is not None and expected < offset:
                yield range(expected, offset)
            expected = offset + 1
        if expected is not None and expected < self._next:
            yield range(expected, self._next)
        for done in self._done:  # what an earlier member wrote
            if done.stop > self._next:
                yield range(max(done.start, self._next), done.stop)


def _write(lowest: int, done: list[range], attempts: dict[int, int]) -> str:
    """Write what is known above *lowest*; what there is no room for comes again, or is counted from 1."""
    if not done and not attempts:
        return ""
    tried = [f"{offset - lowest}:{attempt}" for offset, attempt in sorted(attempts.items())]
    finished = [f"{each.start - lowest}+{len(each)}" for each in done]
    parts = [_VERSION, *tried, *finished]
    room, kept = BESIDE_A_COMMIT, 0
    while kept < len(parts) and (room := room - len(parts[kept]) - 1) >= 0:
        kept += 1
    return " ".join(parts[:kept])


def _read(position: int, written: str) -> tuple[list[range], dict[int, int]]:
    """Read what `_write` wrote. What another program wrote there says nothing to us."""
    done: list[range] = []
    attempts: dict[int, int] = {}
    version, *parts = written.split(" ")
    if version != _VERSION:
        return done, attempts
    try:
        for part in parts:
            offset, plus, count = part.partition("+")
            if plus:
                done.append(range(position + int(offset), position + int(offset) + int(count)))
            else:
                offset, _, attempt = part.partition(":")
                attempts[position + int(offset)] = int(attempt)
    except ValueError:
        return [], {}
    return sorted(done, key=lambda each: each.start), attempts


# -- where a retry waits -----------------------------------------------------------------------------------------

DELAYS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""
The partitions of a retry topic, by the longest delay (seconds) of what waits in each; the last one has what is longer.

A partition is read in its order. Among delays that differ by no more than a factor, nothing waits for long behind
something that is due later.
"""


def delay_bucket(after: float) -> int:
    """In which partition of a retry topic a message waits that is due in *after* seconds."""
    return bisect_left(DELAYS, after)
