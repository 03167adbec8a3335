"""How often a failing message is retried, and after which delay."""

import pytest

from diator._hints import described
from diator.exceptions import ConfigurationError, EventHandlersFailed
from diator.retrying import PermanentError, RetryPolicy


class Hopeless(PermanentError): ...


def bounds(draw, draws=2_000):
    """Return the smallest and the largest of many values of *draw*, which are close to its limits."""
    seen = [draw() for _ in range(draws)]
    return min(seen), max(seen)


@pytest.mark.parametrize(
    ("attempt", "longest"), [(1, 5), (2, 15), (3, 45), (4, 135), (5, 405), (6, 600), (7, 600), (10**12, 600)]
)
def test_delays_grow_to_a_limit_and_half_of_each_is_random(attempt, longest):
    least, most = bounds(lambda: RetryPolicy().delay(attempt))

    assert longest / 2 <= least < longest * 0.52
    assert longest * 0.98 < most <= longest


def test_half_of_an_immediate_pause_is_random_too():
    least, most = bounds(RetryPolicy(immediate_pause=0.2).pause)

    assert 0.1 <= least < 0.104
    assert 0.196 < most <= 0.2


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"first_delay": 0.0}, 0),
        ({"max_delay": 0.0}, 0),
        ({"first_delay": 900.0}, 600),
        ({"backoff_factor": 1.0}, 5),
        ({"backoff_factor": 1e308}, 600),
        ({"max_delay": float("inf")}, 5 * 3.0**99),
    ],
)
def test_delays_of_other_policies(options, longest):
    assert longest / 2 <= RetryPolicy(**options).delay(100) <= longest


def test_max_attempts_counts_the_first_delivery():
    assert (RetryPolicy().max_attempts, RetryPolicy(delayed_retries=0).max_attempts) == (6, 1)


@pytest.mark.parametrize("count", ["immediate_retries", "delayed_retries", "max_crashes"])
def test_counts_are_not_negative(count):
    RetryPolicy(**{count: 0})

    with pytest.raises(ConfigurationError, match=f"^{count} must be a whole number of at least 0, and it is -1$"):
        RetryPolicy(**{count: -1})


@pytest.mark.parametrize("time", ["immediate_pause", "first_delay", "max_delay"])
def test_times_are_not_negative(time):
    RetryPolicy(**{time: 0.0})

    with pytest.raises(ConfigurationError, match=rf"^{time} must be a number of at least 0, and it is -0\.001$"):
        RetryPolicy(**{time: -0.001})


@pytest.mark.parametrize("option", ["immediate_pause", "first_delay", "max_delay", "backoff_factor"])
def test_nan_is_refused(option):
    with pytest.raises(ConfigurationError):
        RetryPolicy(**{option: float("nan")})


def test_a_factor_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="backoff_factor must be a number of at least 1"):
        RetryPolicy(backoff_factor=0.99)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (PermanentError(), True),
        (Hopeless(), True),
        (LookupError(), False),
        (EventHandlersFailed("", [PermanentError(), Hopeless()]), True),
        (EventHandlersFailed("", [LookupError(), Hopeless()]), False),
        (EventHandlersFailed("", [EventHandlersFailed("", [Hopeless()]), PermanentError()]), True),
        (EventHandlersFailed("", [EventHandlersFailed("", [Hopeless(), OSError()]), PermanentError()]), False),
        (EventHandlersFailed("", [LookupError(), OSError()]), False),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), False),
    ],
)
def test_a_group_is_permanent_if_each_of_its_errors_is(error, permanent):
    assert RetryPolicy().is_permanent(error) is permanent


def test_a_program_names_its_own_permanent_errors():
    policy = RetryPolicy(permanent=(LookupError, PermanentError))

    assert policy.is_permanent(KeyError())
    assert policy.is_permanent(Hopeless())
    assert not RetryPolicy(permanent=()).is_permanent(Hopeless())


@pytest.mark.parametrize("permanent", [[LookupError], LookupError, (LookupError(),), ("LookupError",), None])
def test_permanent_must_be_a_tuple_of_classes(permanent):
    """A list would pass until the first handler fails, and then end the consumer."""
    with pytest.raises(ConfigurationError) as refused:
        RetryPolicy(permanent=permanent)

    assert str(refused.value) == (
        "permanent must be a tuple of exception classes, such as (PermanentError, OSError), and it is "
        f"{described(permanent)}"
    )
