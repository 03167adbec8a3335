"""How often a consumer retries a failing message, and how long it waits before each retry."""

from __future__ import annotations

import random
from dataclasses import dataclass

from diator._hints import described
from diator._options import check_counts, check_numbers
from diator.exceptions import ConfigurationError


class PermanentError(Exception):
    """
    Tells the consumer not to retry: it dead-letters the message at once.

    Raise it, or an error that derives from it, when another attempt cannot succeed.
    """


class CommittedTooEarly(PermanentError):
    """
    A handler has committed its transaction by itself, with the note of the inbox in it, and has failed afterwards.

    Or it has raised events, which are not stored in that transaction any more. A retry would be taken for a duplicate,
    and acknowledged without the rest of the work and its events. So the message is dead-lettered at once.
    """


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """
    How often a failing message is retried, with which backoff, and when the consumer dead-letters it.

    In each delivery the consumer calls the handlers that failed again, up to *immediate_retries* times, without
    requeueing the message. Then it requeues the message with a delay, up to *delayed_retries* times; every handler is
    called in the next delivery. Then it dead-letters the message. So a handler runs at most
    `(immediate_retries + 1) * (delayed_retries + 1)` times, unless a consumer crashes. The service counts the
    deliveries, so the limit holds for any number of consumers. On a transport without delayed retries, the consumer
    makes immediate retries only.

    The delay grows exponentially: `first_delay * backoff_factor ** n`, at most `max_delay`. Half of every pause and
    delay is random (jitter), so that messages which failed together are not retried together. Times are in seconds.

    Attributes:
        immediate_retries: How often a handler that fails is called again within one delivery.
        immediate_pause: The longest pause before each of these calls.
        delayed_retries: How often the message is requeued.
        first_delay: The longest delay of the first requeue.
        backoff_factor: How much longer each delay is than the one before; at least 1.
        max_delay: The limit of the delay.
        max_crashes: How many deliveries, beyond `max_attempts`, may end unsettled, such as by a crash of the consumer.
            At the next delivery the message counts as a poison message: the consumer dead-letters it without calling a
            handler.
        retry_undecodable: Whether a message whose payload does not fit the class of its event is requeued like a
            failing one, without immediate retries. During a rolling deploy, a newer consumer of the group can decode
            it. A body that is not a message, such as one that is not JSON, is dead-lettered at once.
        permanent: A tuple of the classes of errors that are not retried. The consumer dead-letters the message at once
            if no handler failed with another error. The value replaces the default, so name `PermanentError` too.

    Raises:
        ConfigurationError: A count or a time is negative, or *backoff_factor* is below 1.
    """

    immediate_retries: int = 2
    immediate_pause: float = 0.1
    delayed_retries: int = 5
    first_delay: float = 5.0
    backoff_factor: float = 3.0
    max_delay: float = 600.0
    max_crashes: int = 3
    retry_undecodable: bool = True
    permanent: tuple[type[Exception], ...] = (PermanentError,)

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("immediate_retries", "delayed_retries", "max_crashes")}
        times = {name: getattr(self, name) for name in ("immediate_pause", "first_delay", "max_delay")}
        check_counts(0, **counts)
        check_numbers(0, **times)
        check_numbers(1, backoff_factor=self.backoff_factor)
        classes: object = self.permanent  # a list would fail much later, when the first handler fails
        if not isinstance(classes, tuple) or not all(isinstance(each, type) for each in classes):
            raise ConfigurationError(
                "permanent must be a tuple of exception classes, such as (PermanentError, OSError), and it is "
                f"{described(classes)}"
            )

    @property
    def max_attempts(self) -> int:
        """The number of deliveries after which the consumer dead-letters a failing message."""
        return self.delayed_retries + 1

    def is_permanent(self, error: BaseException) -> bool:
        """Return whether *error* rules out a retry. An exception group does if each of its errors does."""
        if isinstance(error, self.permanent):
            return True
        return isinstance(error, BaseExceptionGroup) and all(self.is_permanent(each) for each in error.exceptions)

    def pause(self) -> float:
        """Return a random pause before the next immediate retry, in seconds."""
        return _jittered(self.immediate_pause)

    def delay(self, attempt: int) -> float:
        """Return a random delay before the next delivery, in seconds. *attempt* is 1 after the first delivery."""
        # The loop stops at the limit: with many attempts, a power would overflow a float.
        delay = self.first_delay
        for _ in range(attempt - 1):
            delay *= self.backoff_factor
            if delay >= self.max_delay:
                break
        return _jittered(min(delay, self.max_delay))


def _jittered(seconds: float) -> float:
    return seconds / 2 + random.uniform(0, seconds / 2)  # noqa: S311  # jitter needs no secure randomness
