"""The map from requests to handlers, and the handlers that it refuses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import pytest

from diator.container import Container
from diator.exceptions import BindingError, HandlerNotFound
from diator.mediator import Mediator
from diator.requests import Request, RequestHandler, RequestMap
from tests.unit.doubles import Join

T = TypeVar("T")


@dataclass
class Read(Request[float]):
    id: int = 1


class JoinHandler(RequestHandler[Join, str]):
    async def handle(self, request: Join) -> str:
        return ""


class WithoutAnnotations(RequestHandler[Join, str]):
    async def handle(self, request):
        return ""


class AnythingHandler:
    async def handle(self, request: object) -> str:
        return ""


class Logging(Generic[T]):
    """A generic base class that says nothing about messages."""


class OfTwoBases(Logging[int], RequestHandler[Join, str]):
    async def handle(self, request):
        return ""


class ByClass:
    @classmethod
    async def handle(cls, request: Join) -> str:
        return ""


class ByNothing:
    @staticmethod
    async def handle(request: Join) -> str:
        return ""


async def join(command: Join) -> str:
    return ""


class Service:
    async def join(self, command: Join) -> str:
        return ""

    async def __call__(self, command: Join) -> str:
        return ""


GOOD = [
    JoinHandler,
    WithoutAnnotations,
    AnythingHandler,
    OfTwoBases,
    ByClass,
    ByNothing,
    join,
    Service().join,
    Service(),
    partial(join),
    partial(Service()),
    partial(Service().join),
]


@pytest.mark.parametrize("handler", GOOD, ids=range(len(GOOD)))
def test_returns_the_bound_handler(handler):
    requests = RequestMap()

    requests.bind(Join, handler)

    assert requests.get(Join) is handler
    assert [*requests] == [Join]


@pytest.mark.parametrize("handler", [JoinHandler, WithoutAnnotations, OfTwoBases, ByClass, ByNothing, join])
def test_the_decorator_reads_the_request_from_the_annotation(handler):
    requests = RequestMap()

    assert requests.handler(handler) is handler

    assert requests.get(Join) is handler


async def test_a_partial_of_an_object_is_called_with_its_arguments():
    """Its keywords look like defaults, which a registered type would replace."""

    class Answers:
        async def __call__(self, command: Join, text: str, number: int) -> str:
            return f"{text} {number}"

    container = Container()
    container.register_instance(str, "registered")
    container.register_instance(int, 7)
    requests = RequestMap()
    requests.bind(Join, partial(Answers(), text="bound"))

    assert await Mediator(requests, container).send(Join()) == "bound 7"


def test_the_name_of_a_handler_does_not_contain_what_a_partial_or_an_object_holds():
    @dataclass
    class Answers:
        password: str

        async def __call__(self, command: Join, token: str) -> str:
            raise NotImplementedError

    requests = RequestMap()
    requests.bind(Join, partial(Answers("secret"), token="secret"))

    with pytest.raises(BindingError, match=r"already bound to .*Answers;") as caught:
        requests.bind(Join, join)
    assert "secret" not in str(caught.value)


def test_any_class_can_be_a_request():
    requests = RequestMap()

    @requests.handler
    async def shout(text: str) -> str:
        return text.upper()

    assert requests.get(str) is shout


def test_a_request_without_a_handler_is_not_found():
    with pytest.raises(HandlerNotFound, match="Join"):
        RequestMap().get(Join)


def test_a_request_has_one_handler():
    requests = RequestMap()
    requests.bind(Join, JoinHandler)

    with pytest.raises(BindingError, match="Join is already bound to JoinHandler"):
        requests.bind(Join, join)

    assert requests.get(Join) is JoinHandler


# -- handlers that can never handle the request ----------------------------------------------------------------------


class ForRead(RequestHandler[Read, float]):
    async def handle(self, request: Read) -> float:
        return 1.0


class Unfinished(RequestHandler[Join, str], ABC):
    @abstractmethod
    def answer(self): ...

    @abstractmethod
    def ask(self): ...

    async def handle(self, request: Join) -> str:
        return ""


class CallableHandler(JoinHandler):
    async def __call__(self, request: Join) -> str:
        return ""


class WithoutHandle: ...


class Synchronous:
    def handle(self, request: Join) -> str:
        return ""


class TakesNothing:
    async def handle(self) -> str:
        return ""


class NeedsMore:
    async def handle(self, request: Join, retries: int, pause: float, timeout: float = 1.0) -> str:
        return ""


class AnswersAnother:
    async def handle(self, request: Join) -> int:
        return 1


def synchronous(command: Join) -> str:
    return ""


async def takes_nothing() -> str:
    return ""


async def takes_it_by_name(*, command: Join) -> str:
    return ""


async def answers_nothing(command: Join) -> None: ...


async def wraps_itself(command: Join) -> str:
    return ""


wraps_itself.__wrapped__ = wraps_itself


async def misspelt(command: "Jion") -> str:  # noqa: F821
    return ""


def test_an_unknown_name_in_an_annotation_is_allowed_where_the_type_is_passed():
    """Names that are imported for type checkers only, and local classes, do not exist at run time."""
    requests = RequestMap()

    requests.bind(Join, misspelt)

    assert requests.get(Join) is misspelt
    with pytest.raises(BindingError, match="name 'Jion', which its module does not define at run time"):
        RequestMap().handler(misspelt)


DIFFERS = "but the response of Join is str; change one of the annotations"
NEITHER = "is neither a handler class nor a function; bind the class, not an instance"


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        (ForRead, "ForRead handles Read and cannot be bound to Join"),
        (RequestHandler, "RequestHandler is abstract; define handle"),
        (Unfinished, "Unfinished is abstract; define answer, ask"),
        (
            WithoutHandle,
            "WithoutHandle has no method `handle`; bind a class with `async def handle(self, message)`",
        ),
        (Synchronous, "Synchronous.handle is not asynchronous; define it with `async def`"),
        (synchronous, "synchronous is not asynchronous; define it with `async def`"),
        (TakesNothing, "TakesNothing.handle takes no message; its first parameter must be the message"),
        (
            NeedsMore,
            (
                "NeedsMore.handle is called with the message alone, but also needs retries, pause; let the constructor "
                "take dependencies"
            ),
        ),
        (takes_nothing, "takes_nothing takes no message; its first parameter must be the message"),
        (takes_it_by_name, "takes_it_by_name takes no message; its first parameter must be the message"),
        (AnswersAnother, f"AnswersAnother returns int, {DIFFERS}"),
        (
            answers_nothing,
            f"answers_nothing returns NoneType, {DIFFERS}",
        ),
        (wraps_itself, "the parameters of wraps_itself cannot be inspected; wrap it in a function"),
        (JoinHandler(), f"an object of JoinHandler {NEITHER}"),
        (CallableHandler(), f"an object of CallableHandler {NEITHER}"),
        (None, f"an object of NoneType {NEITHER}"),
        (
            partial(JoinHandler),
            (
                "a partial of the class JoinHandler is not a handler; bind the class, and let the container pass the "
                "arguments"
            ),
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_refuses(handler, problem):
    requests = RequestMap()

    with pytest.raises(BindingError) as refused:
        requests.bind(Join, handler)

    assert str(refused.value) == problem
    assert [*requests] == []


def test_refuses_to_bind_to_an_object():
    with pytest.raises(BindingError) as refused:
        RequestMap().bind(Join(), join)

    assert str(refused.value) == f"{Join()!r} is not a class; bind handlers to the class of a request or an event"


async def without_annotation(message): ...


async def of_two_kinds(message: Join | Read): ...


async def of_any_kind(message: Any): ...


class WithoutAnnotation:
    async def handle(self, message): ...


class OfAnotherBase(Logging[int]):
    async def handle(self, message): ...


@pytest.mark.parametrize("anything", [without_annotation, of_two_kinds, of_any_kind, WithoutAnnotation, OfAnotherBase])
def test_the_decorator_refuses_a_handler_without_a_usable_annotation(anything):
    problem = f"the message of {anything.__name__} has no usable type: annotate 'message' with one class"

    with pytest.raises(BindingError, match=f"^{problem}$"):
        RequestMap().handler(anything)


# -- handlers that can, although a class check cannot decide it ------------------------------------------------------


class Named(Protocol):
    user_id: int


class Link(TypedDict):
    url: str


def handling(request_hint, answer_hint):
    async def handle(request: request_hint) -> answer_hint: ...

    return handle


def promising(answer):
    return type("Promising", (Request,), {"__orig_bases__": (Request[answer],)})


@pytest.mark.parametrize("hint", [Any, object, Named, Join | Read, Request, Request[str]], ids=str)
def test_a_handler_may_accept_more_than_its_request(hint):
    RequestMap().bind(Join, handling(hint, str))


@pytest.mark.parametrize(
    ("promised", "given"),
    [
        (int, int),
        (int, bool),
        (int, Any),
        (Any, int),
        (float, int),
        (object, int),
        (None, None),
        (list[int], list[int]),
        (int | None, int),
        (Named, Join),
        (Link, Link),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_a_handler_may_return_what_type_checkers_accept(promised, given):
    request = promising(promised)

    RequestMap().bind(request, handling(request, given))


def test_a_bare_request_promises_nothing():
    class Bare(Request): ...

    RequestMap().bind(Bare, handling(Bare, int))
