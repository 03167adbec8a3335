"""Which messages of one partition are finished: the arithmetic of commits, without a client or a clock."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

MAX_COMMIT_METADATA = 4_096
"""How many characters of metadata Kafka stores with a commit: the default of `offset.metadata.max.bytes`."""
TOPIC_ID_LENGTH = 32 + 1
"""How many of these characters the id of the topic takes, which stands before `Offsets.progress`."""
_VERSION = "1"
# No consumer is ten million messages ahead of its oldest unfinished one.
_METADATA = re.compile(rf"{_VERSION}( [0-9]{{1,7}}[:+][0-9]{{1,7}})*")


class Offsets:
    """
    The messages of one partition, from its oldest unfinished one.

    They are taken in the order of their offsets, and finished in any order. The committed offset is the oldest
    unfinished one, never the newest finished one. The commit's metadata lists the messages that were finished above it,
    and the attempts of the unfinished ones, so that both outlive a rebalance. An offset that is never taken counts as
    finished: a compacted topic has such holes.

    Args:
        position: The offset to begin at.
        metadata: The metadata of the group's last commit, as `progress` returned it.
    """

    def __init__(self, position: int, metadata: str = "") -> None:
        self._next = position
        self._unfinished: dict[int, int] = {}  # in the order of their offsets, each with its attempt
        self._done, self._attempts = _parse(position, metadata)

    @property
    def next(self) -> int:
        """The offset that is expected next."""
        return self._next

    @property
    def lowest(self) -> int:
        """The oldest unfinished offset."""
        return next(iter(self._unfinished), self._next)

    @property
    def spread(self) -> int:
        """How far the newest taken offset is ahead of the oldest unfinished one."""
        return self._next - self.lowest

    def take(self, offset: int) -> int:
        """Record that the message at *offset* has arrived. Return its attempt; 0 if it was taken or finished before."""
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
        """Record that the message at *offset* must not be delivered again."""
        self._unfinished.pop(offset, None)

    def requeue(self, offset: int) -> int:
        """Record that the message at *offset* will be delivered again. Return the attempt that this will be."""
        self._unfinished[offset] += 1
        return self._unfinished[offset]

    def attempt(self, offset: int) -> int:
        """Return the attempt of the message at *offset*, which was taken and is not finished."""
        return self._unfinished.get(offset, 1)

    def progress(self) -> tuple[int, str]:
        """Return what to commit: the oldest unfinished offset, and the metadata."""
        lowest = self.lowest
        attempts = {offset: attempt for offset, attempt in self._unfinished.items() if attempt > 1}
        return lowest, _format(lowest, [*self._finished_above()], {**attempts, **self._attempts})

    def _finished_above(self) -> Iterator[range]:
        expected = None
        for offset in self._unfinished:
            if expected is not None and expected < offset:
                yield range(expected, offset)
            expected = offset + 1
        if expected is not None and expected < self._next:
            yield range(expected, self._next)
        for done in self._done:  # from the metadata of the last commit
            if done.stop > self._next:
                yield range(max(done.start, self._next), done.stop)


def _format(lowest: int, done: list[range], attempts: dict[int, int]) -> str:
    """Write the metadata. A message that it has no room for is delivered again, or its attempts count from 1 again."""
    if not done and not attempts:
        return ""
    tried = [f"{offset - lowest}:{attempt}" for offset, attempt in sorted(attempts.items())]
    finished = [f"{each.start - lowest}+{len(each)}" for each in done]
    parts = [_VERSION, *tried, *finished]
    room, kept = MAX_COMMIT_METADATA - TOPIC_ID_LENGTH, 0
    while kept < len(parts) and (room := room - len(parts[kept]) - 1) >= 0:
        kept += 1
    return " ".join(parts[:kept])


def _parse(position: int, metadata: str) -> tuple[list[range], dict[int, int]]:
    """Read what `_format` wrote. Ignore the metadata of another program, and whatever else cannot be true."""
    if len(metadata) > MAX_COMMIT_METADATA or not _METADATA.fullmatch(metadata):
        return [], {}
    done: list[range] = []
    attempts: dict[int, int] = {}
    for part in metadata.split(" ")[1:]:
        offset, plus, count = part.partition("+")
        if plus:
            done.append(range(position + int(offset), position + int(offset) + int(count)))
        else:
            offset, _, attempt = part.partition(":")
            attempts[position + int(offset)] = max(1, int(attempt))
    return sorted(done, key=lambda each: each.start), attempts


# -- where a retry waits -----------------------------------------------------------------------------------------

DELAYS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
"""
The delay buckets, one for each partition of a retry topic: the longest delay of each, in seconds.

One more partition has the longer delays. A partition is read in its order. In each bucket the delays differ by a factor
of four at most, so that no retry waits for long behind one that is due later. The delays of the default retry policy
are not in the last one: there, a due time that somebody has forged can be far away.
"""
LONGEST_DELAY = 7 * 24 * 3600.0
"""How many seconds ahead any retry is due, at most. By default, Kafka deletes a message after a week."""


def delay_bucket(after: float) -> int:
    """Return the partition of a retry topic for a retry that is due in *after* seconds."""
    return bisect_left(DELAYS, after)


def longest_delay(number: int, partitions: int) -> float:
    """Return how long a retry waits at most in one of so many *partitions*; the last one has all longer delays."""
    return DELAYS[number] if number < min(len(DELAYS), partitions - 1) else LONGEST_DELAY
