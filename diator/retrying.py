"""How often a failing message is handled again, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from diator.exceptions import ConfigurationError


class PermanentError(Exception):
    """Raise this, or derive from it, where handling again cannot help: the message is put aside at once."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """
    First *immediate* times in place, then *delayed* times by giving it back to the service; then it is put aside.

    So, unless consumers die of it, a message is handled at most `(immediate + 1) * (delayed + 1)` times, however many
    consumers there are: the count of deliveries is the service's. Where a transport cannot give back, only the
    immediate ones remain.

    All times are in seconds. Half of each pause is random, so that messages which failed together do not come
    back together.
    """

    immediate_retries: int = 2
    immediate_pause: float = 0.1
    delayed_retries: int = 5
    first_delay: float = 5.0
    backoff_factor: float = 3.0
    max_delay: float = 600.0
    max_crashes: int = 3
    """How many deliveries, beyond these, may end without an outcome, before the message counts as a killer."""
    permanent: tuple[type[Exception], ...] = (PermanentError,)

    def __post_init__(self) -> None:
        counts_and_times = (
            *(self.immediate_retries, self.delayed_retries, self.max_crashes),
            *(self.immediate_pause, self.first_delay, self.max_delay),
        )
        if not all(value >= 0 for value in counts_and_times) or not self.backoff_factor >= 1:  # nor is NaN
            raise ConfigurationError(
                f"{self} makes no sense: counts and times are not negative, and backoff_factor is at least 1"
            )

    @property
    def max_attempts(self) -> int:
        """The number of deliveries after which a failing message is put aside."""
        return self.delayed_retries + 1

    def is_permanent(self, error: BaseException) -> bool:
        """Tell whether handling again cannot help. Of several errors, one is enough."""
        if isinstance(error, BaseExceptionGroup):
            return any(self.is_permanent(each) for each in error.exceptions)
        return isinstance(error, self.permanent)

    def pause(self) -> float:
        """Seconds before handling again in place."""
        return _jittered(self.immediate_pause)

    def delay(self, attempt: int) -> float:
        """Seconds before the delivery after *attempt*, which is 1 for the first."""
        # Not computed beyond the limit: a power of a large number of attempts is no float any more.
        delay = self.first_delay
        for _ in range(attempt - 1):
            delay *= self.backoff_factor
            if delay >= self.max_delay:
                break
        return _jittered(min(delay, self.max_delay))


def _jittered(seconds: float) -> float:
    return seconds / 2 + random.uniform(0, seconds / 2)  # noqa: S311  # nobody's secret
