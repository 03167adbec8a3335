"""The shape of a transport. A wrong one fails every scenario, each with an error that tells little."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable

from diator.brokers.capabilities import Capabilities
from diator.testing._suite.errors import Nonconformance


def check_broker(broker: object) -> None:
    """Raise `Nonconformance` unless *broker* has the methods of a transport."""
    kind = type(broker).__name__
    for name in ("send_message", "subscribe", "aclose", "__aenter__", "__aexit__"):
        if not callable(getattr(broker, name, None)):
            raise Nonconformance(f"`Harness.transport` returned a {kind}, which has no method {name}", rule="Transport")
    capabilities = getattr(broker, "capabilities", None)
    if not isinstance(capabilities, Capabilities):
        found = "a method; make it a property" if callable(capabilities) else repr(capabilities)
        raise Nonconformance(f"`capabilities` of {kind} is {found}", rule="capabilities")
    subscribe = getattr(broker, "subscribe", None)
    if inspect.iscoroutinefunction(subscribe) or inspect.isasyncgenfunction(subscribe):
        raise Nonconformance(
            f"`subscribe` of {kind} returns no asynchronous context manager; write it as an asynchronous generator "
            "with the decorator `contextlib.asynccontextmanager`",
            rule="subscribe",
        )


def check_awaitable(result: object, name: str) -> None:
    """Raise `Nonconformance` unless *result* of the method *name* can be awaited."""
    if not isinstance(result, Awaitable):
        raise Nonconformance(f"{name}() returned {result!r:.80}, which cannot be awaited; write it with `async def`")
