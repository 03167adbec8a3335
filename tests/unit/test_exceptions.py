"""All errors share one root, have a built-in second parent where one fits, and carry facts as attributes."""

import inspect
from uuid import uuid4

import pytest

from diator import exceptions
from diator.exceptions import (
    BrokerError,
    DiatorError,
    EventHandlersFailed,
    EventsNotSent,
    IncompatibleClient,
    MessageTooLarge,
    MissingExtra,
    ResolutionError,
)
from tests.unit.doubles import MeetingChanged, UserJoined

ERRORS = [error for _, error in inspect.getmembers(exceptions, inspect.isclass) if issubclass(error, BaseException)]


@pytest.mark.parametrize("error", ERRORS)
def test_there_is_one_root(error):
    assert issubclass(error, DiatorError)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("BindingError", TypeError),
        ("BrokerNotConfigured", RuntimeError),
        ("BrokerUnavailable", ConnectionError),
        ("DecodingError", ValueError),
        ("EncodingError", ValueError),
        ("EventHandlersFailed", ExceptionGroup),
        ("HandlerNotFound", LookupError),
        ("IncompatibleClient", ImportError),
        ("MessageTooLarge", exceptions.MessageRejected),
        ("MessageTooLarge", ValueError),
        ("MissingExtra", ImportError),
        ("NotAnEvent", TypeError),
        ("OutcomeUnknown", TimeoutError),
        ("ResolutionError", LookupError),
        ("SharedHandler", RuntimeError),
        ("ConfigurationError", ValueError),
        ("UsageError", RuntimeError),
    ],
)
def test_has_a_builtin_parent(error, builtin):
    assert issubclass(getattr(exceptions, error), builtin)


def test_wrong_use_is_not_a_wrong_value():
    """A `UsageError` depends on the state of an object, so `except ConfigurationError` must not catch it."""
    assert not issubclass(exceptions.UsageError, (exceptions.ConfigurationError, ValueError, BrokerError))


SEND_ERRORS = [
    "BrokerUnavailable",
    "AccessRefused",
    "BrokerClosed",
    "MessageRejected",
    "MessageUnroutable",
    "OutcomeUnknown",
]


@pytest.mark.parametrize("name", SEND_ERRORS)
def test_a_send_error_names_its_message(name):
    message_id = uuid4()

    error = getattr(exceptions, name)("it broke", message_id=message_id)

    assert isinstance(error, BrokerError)
    assert error.message_id == message_id
    assert str(error).startswith(f"message {message_id}: ")
    assert str(error).endswith("it broke")


def test_the_table_of_send_errors_is_complete():
    table = inspect.getdoc(exceptions).partition("=\n")[2]

    assert [line.partition("`")[2].partition("`")[0] for line in table.splitlines()[:-1]] == SEND_ERRORS


def test_a_broker_error_may_concern_no_message():
    assert (str(BrokerError("it broke")), BrokerError("it broke").message_id) == ("it broke", None)


def test_a_resolution_error_prints_its_path_as_a_tree():
    error = ResolutionError(["Handler", "Service"], "Service is not registered")

    assert str(error) == "Service is not registered\n  └ Handler\n    └ Service"
    assert error.path == ("Handler", "Service")


def test_a_missing_extra_names_the_command_that_installs_it():
    error = MissingExtra("diator.brokers.redis", "redis")

    assert str(error) == "diator.brokers.redis needs an extra that is not installed: pip install 'diator[redis]'"
    assert error.extra == "redis"


def test_an_incompatible_client_names_what_it_lacks_and_the_remedy():
    error = IncompatibleClient("rodi", "4.0", "rodi.Container.provider", "rodi<3,>=2.1")

    assert str(error).startswith("rodi 4.0 has no rodi.Container.provider, which diator uses; install ")
    assert "pip install 'rodi<3,>=2.1'" in str(error)
    assert (error.distribution, error.version, error.attribute) == ("rodi", "4.0", "rodi.Container.provider")


def test_too_large_contains_both_sizes():
    error = MessageTooLarge(2_000_000, 1_000_000, message_id=None)

    assert "2,000,000 bytes, and this broker accepts 1,000,000" in str(error)
    assert (error.size, error.limit) == (2_000_000, 1_000_000)


def test_events_not_sent_names_each_event():
    events = [UserJoined(), MeetingChanged()]

    error = EventsNotSent("answer", events, [event.event_id for event in events])

    assert f"UserJoined {events[0].event_id}, MeetingChanged {events[1].event_id};" in str(error)
    assert (error.response, error.events) == ("answer", tuple(events))


def test_a_split_group_keeps_its_type():
    error = EventHandlersFailed("failed", [KeyError(1), OSError(2)])

    matching, rest = error.split(KeyError)

    assert (type(matching), type(rest)) == (EventHandlersFailed, EventHandlersFailed)
