"""
The workloads of every library.

Each workload has its own loop: a loop that calls a passed-in function would add that call to both sides
and draw every ratio towards one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

Handler = TypeVar("Handler")
Repeat = Callable[[int], Awaitable[object]]
Send = Callable[[Any], Awaitable[Any]]

WORKLOADS = {
    "W0": "construct the command",
    "W1": "command, no middleware, no events",
    "W2": "query with a small response",
    "W3": "W1 through 3 middlewares",
    "W4": "command, 1 domain event, 2 handlers",
    "W5": "1,000 request types in turn",
    "W6": "1,000 commands at once",
    "W7e": "notification event to message bytes",
    "W7d": "message bytes to typed event",
}

MEETING_ID = 17
USER_ID = 4_711
LINK = "https://meetings.example/17"
NICKNAME = "Ada"
TYPES = 1_000
CONCURRENT = 1_000


class Tally:
    """
    Counts the calls of all handlers, which are constructed with it.

    Calling `note` is the only work of a handler, on both sides of every comparison.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.user_id = 0

    def note(self, user_id: int) -> None:
        self.calls += 1
        self.user_id = user_id


class Outbox:
    """The bytes of the last message that a broker received."""

    body = b""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A function to repeat, and the checks of its result."""

    repeat: Repeat
    returns: Callable[[Any], bool]
    tally: Tally
    counted: int = 1
    sends: int = 1

    async def verify(self) -> None:
        """Raise unless a few repetitions return the right result and call the right handlers."""
        before, repetitions = self.tally.calls, 3

        result = await self.repeat(repetitions)

        counted, expected = self.tally.calls - before, repetitions * self.sends * self.counted
        if counted != expected:
            raise AssertionError(f"counted {counted} calls where there should be {expected}")
        if not self.returns(result):
            raise AssertionError(f"returned {result!r}")


def construction(request_type: Callable[..., Any]) -> Workload:
    async def repeat(times: int) -> object:
        for _ in range(times):
            request = request_type(meeting_id=MEETING_ID, user_id=USER_ID)
        return request

    return Workload(repeat=repeat, returns=is_the_command, tally=Tally(), counted=0)


def sending(
    send: Send,
    request: object,
    tally: Tally,
    *,
    counted: int = 1,
    returns: Callable[[Any], bool] = lambda result: result is None,
) -> Workload:
    async def repeat(times: int) -> object:
        for _ in range(times):
            result = await send(request)
        return result

    return Workload(repeat=repeat, returns=returns, tally=tally, counted=counted)


def query(send: Send, request: object, tally: Tally) -> Workload:
    return sending(send, request, tally, returns=is_the_link)


def sending_in_turn(send: Send, requests: Sequence[object], tally: Tally) -> Workload:
    async def repeat(times: int) -> object:
        for _ in range(times):
            for request in requests:
                result = await send(request)
        return result

    return Workload(repeat=repeat, returns=lambda result: result is None, tally=tally, sends=len(requests))


def sending_at_once(send: Send, request: object, tally: Tally) -> Workload:
    async def repeat(times: int) -> object:
        for _ in range(times):
            results = await asyncio.gather(*[send(request) for _ in range(CONCURRENT)])
        return results

    return Workload(repeat=repeat, returns=lambda results: not any(results), tally=tally, sends=CONCURRENT)


def encoding(emit: Send, event: Any, outbox: Outbox) -> Workload:
    async def repeat(times: int) -> object:
        outbox.body = b""
        for _ in range(times):
            await emit(event)
        return outbox.body

    return Workload(repeat=repeat, returns=carries(event), tally=Tally(), counted=0)


def decoding(decode: Callable[[bytes], Any], body: bytes, event: Any) -> Workload:
    async def repeat(times: int) -> object:
        for _ in range(times):
            decoded = decode(body)
        return decoded

    return Workload(repeat=repeat, returns=lambda decoded: decoded == event, tally=Tally(), counted=0)


def is_the_command(request: Any) -> bool:
    return (request.meeting_id, request.user_id) == (MEETING_ID, USER_ID)


def is_the_link(response: Any) -> bool:
    return (response.meeting_id, response.link) == (MEETING_ID, LINK)


def carries(event: Any) -> Callable[[bytes], bool]:
    """Return a check whether a message contains *event*; some libraries write its id without hyphens."""
    parts = [event.event_id.hex, str(USER_ID), str(MEETING_ID), NICKNAME]
    return lambda body: all(part in body.decode().replace("-", "") for part in parts)


def copy_of(handler_type: type[Handler], number: int) -> type[Handler]:
    """
    Return a copy of the class with its own code.

    A thousand subclasses that share one `handle` would need no more of the caches than one class.
    """
    namespace = {
        name: own_code(value) for name, value in vars(handler_type).items() if name not in ("__dict__", "__weakref__")
    }
    return type(handler_type)(f"{handler_type.__name__}{number}", handler_type.__bases__, namespace)


def own_code(member: object) -> object:
    match member:
        case FunctionType():
            return code_and_all(member)
        case property(fget=FunctionType() as getter):
            return property(code_and_all(getter))
        case _:
            return member


def code_and_all(function: FunctionType) -> FunctionType:
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        closure=function.__closure__,
    )
    copied.__annotations__ = dict(function.__annotations__)
    return copied
