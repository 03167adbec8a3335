"""All errors share one root, have a built-in second parent where one fits, and carry facts as attributes."""

import contextlib
import copy
import importlib
import inspect
import pickle
import typing
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest

import diator
from diator import exceptions
from diator.exceptions import (
    BrokerError,
    BrokerUnavailable,
    DiatorError,
    EventHandlersFailed,
    EventsNotSent,
    IncompatibleClient,
    MessagesNotSent,
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
        ("NotCommitted", RuntimeError),
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


# -- copies and pickles ------------------------------------------------------------------------------------------


def public_errors():
    """Return every error class that a public module shows, as far as its extra is installed."""
    root = Path(diator.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        parts = ["diator", *path.relative_to(root).with_suffix("").parts]
        if any(part.startswith("_") for part in parts if part != "__init__"):
            continue
        with contextlib.suppress(ImportError):
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            found |= {each for _, each in inspect.getmembers(module, inspect.isclass)}
    errors = (each for each in found if issubclass(each, BaseException) and each.__module__.startswith("diator."))
    return sorted(errors, key=lambda each: each.__qualname__)


EXAMPLES = {
    str: "text",
    int: 5,
    UUID: UUID(int=7),
    UUID | None: UUID(int=7),
    type: UserJoined,
    Sequence[type]: [UserJoined, UserJoined],
    object: "response",
    Sequence[str]: ["a", "b"],
    Sequence[UUID]: [UUID(int=7)],
    Sequence[object]: [UserJoined()],
}


def example_of(error_class):
    """Return an error of the class, made of an example for each parameter, with a note and an attribute."""
    if issubclass(error_class, BaseExceptionGroup):
        arguments, options = ["text", [example_of(error) for error in (KeyError, BrokerError)]], {}
    elif "__init__" not in {
        name for each in error_class.__mro__ if issubclass(each, DiatorError) for name in vars(each)
    }:
        arguments, options = ["text"], {}
    else:
        signature = inspect.signature(error_class)
        hints = typing.get_type_hints(error_class.__init__)
        arguments = [EXAMPLES[hints[p.name]] for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        options = {p.name: EXAMPLES[hints[p.name]] for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    error = error_class(*arguments, **options)
    error.add_note("a note")
    error.attribute = ["of the program"]
    return error


def content_of(error):
    content = {**vars(error), "type": type(error), "text": str(error), "repr": repr(error), "args": repr(error.args)}
    if isinstance(error, ImportError):
        content["msg"] = error.msg
    if isinstance(error, BaseExceptionGroup):
        content["exceptions"] = [content_of(each) for each in error.exceptions]
    return content


def pickled(protocol):
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle-{protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error_class", public_errors(), ids=lambda each: each.__name__)
def test_every_error_can_be_copied_and_pickled(error_class, way):
    error = example_of(error_class)

    copied = WAYS[way](WAYS[way](error))

    assert copied is not error
    assert content_of(copied) == content_of(error)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_keeps_the_send_error_and_not_the_error_of_a_client_library(way):
    class ClientError(Exception):  # local, so it cannot be pickled
        pass

    error, send_error = MessagesNotSent([UUID(int=7)]), BrokerUnavailable("it is down", message_id=UUID(int=7))
    error.__cause__, send_error.__cause__ = send_error, ClientError()

    copied = WAYS[way](error)

    assert content_of(copied.__cause__) == content_of(send_error)
    if way != "copy":  # which shares the send error
        assert copied.__cause__.__cause__ is None


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_another_transport_can_be_copied_and_pickled(way):
    error = QuotaExceeded("tenant", limit=3)

    assert content_of(WAYS[way](error)) == content_of(error)


class QuotaExceeded(exceptions.MessageRejected):
    """As the author of a transport derives one, with a constructor of its own."""

    def __init__(self, tenant, *, limit):
        super().__init__(f"{tenant} may send {limit} messages", message_id=UUID(int=7))
        self.tenant, self.limit = tenant, limit
