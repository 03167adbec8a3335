"""FLT: a bad link does not make a broker open one connection after another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from time import monotonic

from diator.brokers.base import Transport
from diator.exceptions import BrokerError, MessageUnroutable
from diator.testing._suite.errors import NotApplicable
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Proxy
from diator.testing.conformance._recovery import receives_again
from diator.testing.conformance._scenario import scenario

# How many sends begin in the time that each of them may take, one after another: so each has another deadline.
_SENDS = 300
# How many attempts to connect a backoff makes in the time of its longest delay, and how many before it gets that long.
_ATTEMPTS_IN_MAX_DELAY, _FIRST_ATTEMPTS = 4, 12
# The same for attempts that get no answer, each of which takes the time of a call or so.
_ATTEMPTS_IN_TIMEOUT, _FIRST_UNANSWERED = 4, 4


@scenario(
    "FLT-23",
    "A link that stalls gets no connection for each message",
    level="F",
    facilities=["proxy"],
    timeout=240,
)
async def stalled(ctx: Context) -> None:
    """Catch a client that connects for each waiting caller, and connections that are given up and stay open."""
    proxy, seconds = await ctx.proxy(), 2.5 * ctx.limits.timeout
    allowed = _FIRST_UNANSWERED + _ATTEMPTS_IN_TIMEOUT * seconds / ctx.limits.timeout
    await _storm(ctx, proxy, proxy.withhold, seconds, allowed)
    await _storm(ctx, proxy, proxy.black_hole, seconds, allowed)


@scenario(
    "FLT-24",
    "A link that refuses or resets gets no connection for each message",
    level="F",
    facilities=["proxy"],
    timeout=240,
)
async def refused(ctx: Context) -> None:
    """Catch a client that connects again at once, or for each caller."""
    proxy = await ctx.proxy()

    def reject() -> None:
        proxy.reject()
        proxy.reset()

    def refuse() -> None:
        proxy.refuse()
        proxy.reset()

    seconds = max(3 * ctx.limits.max_delay, 1.2 * ctx.limits.timeout)
    allowed = _FIRST_ATTEMPTS + _ATTEMPTS_IN_MAX_DELAY * seconds / ctx.limits.max_delay
    await _storm(ctx, proxy, reject, seconds, allowed)
    await _storm(ctx, proxy, refuse, seconds, allowed)


async def _storm(ctx: Context, proxy: Proxy, fault: Callable[[], None], seconds: float, allowed: float) -> None:
    """
    Let many callers send and a subscription read during *fault*, for *seconds*. Then check that all works again.

    For each connection that is open before, *allowed* attempts to connect are allowed.
    """
    broker, topic = await ctx.broker(), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        await ctx.send(broker, topic)
        if not await reader.until_fence():
            raise NotApplicable("the proxy of this harness belongs to another service")
        load = _Load(ctx, broker)
        await load.send()
        ctx.check(load.results["sent"], "nothing was sent before the fault")
        loading = ctx.start(load.run())
        await asyncio.sleep(ctx.limits.quiet)
        calm, before, began, most = proxy.clients, proxy.accepted, monotonic(), 0
        load.results.clear()
        fault()
        while monotonic() - began < seconds:
            most = max(most, proxy.clients)
            await asyncio.sleep(0.005)
        attempts = proxy.accepted - before

        load.is_over = True
        waiting = [ctx.message(topic, number) for number in range(1, 31)]
        sends = [ctx.start(load.end_of(ctx.send_all(broker, [message]))) for message in waiting]
        await asyncio.sleep(0)
        await proxy.heal()
        proxy.reset()
        await ctx.within(2 * ctx.limits.timeout + ctx.limits.lag, _all(loading, *sends), "the end of all sends")
        ctx.check(load.results["failed"], "no send failed, so nothing was proved")
        ctx.check(most <= calm + 1, f"{most} connections were open at once, there were {calm} before")
        due = calm * allowed
        ctx.check(attempts <= due, f"{attempts} attempts to connect in {seconds:g} s, at most {due:g} are due")
        ctx.check(load.slowest <= ctx.limits.timeout + ctx.limits.lag, f"a send took {load.slowest:.1f} s")

        await receives_again(ctx, reader, by=ctx.limits.max_delay + ctx.limits.timeout + ctx.limits.recovery)
    sent = [each.message for each in ctx.ledger.sent if each.message.message_name == topic.message_name]
    in_order = ctx.capabilities.ordering == "destination"
    ctx.ledger.compare(reader.name, sent, gaps=reader.gaps).verify(in_order=in_order, may_duplicate=True)


async def _all(*tasks: asyncio.Task[None]) -> None:
    await asyncio.gather(*tasks)


class _Load:
    """
    Callers that send messages which nobody receives.

    Attributes:
        results: How many sends were successful, and how many failed.
        slowest: How long the slowest send took, in seconds.
        is_over: Set it, so that no further send begins.
    """

    def __init__(self, ctx: Context, broker: Transport) -> None:
        self.results: Counter[str] = Counter()
        self.slowest = 0.0
        self.is_over = False
        self._ctx = ctx
        self._broker = broker
        self._topic = ctx.topic()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as sends:
            while not self.is_over:
                sends.create_task(self.send())
                await asyncio.sleep(self._ctx.limits.timeout / _SENDS)

    async def send(self) -> None:
        await self.end_of(self._broker.send_message(self._ctx.message(self._topic)))

    async def end_of(self, sending: Awaitable[None]) -> None:
        """Await *sending*, and note how it ends. Any error but a send error fails the scenario."""
        began = monotonic()
        try:
            await sending
        except MessageUnroutable:
            self.results["sent"] += 1
        except BrokerError:
            self.results["failed"] += 1
        else:
            self.results["sent"] += 1
        self.slowest = max(self.slowest, monotonic() - began)
