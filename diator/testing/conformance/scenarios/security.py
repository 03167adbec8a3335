"""SEC: who may, and who is told that he may not."""

from __future__ import annotations

import logging
import traceback

from diator.brokers.base import Transport
from diator.brokers.capabilities import Capabilities
from diator.exceptions import (
    AccessRefused,
    BrokerError,
    BrokerUnavailable,
    EncodingError,
    MessageRejected,
    OutcomeUnknown,
)
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Access, EnvironmentMissing
from diator.testing.conformance._scenario import scenario


def _guarded(ctx: Context, access: Access) -> Transport | None:
    """Make a broker with *access*; None if the service knows no such thing."""
    try:
        return ctx.closing(ctx.harness.guarded(access))
    except EnvironmentMissing:
        return None


async def _is_kept_out(ctx: Context, access: Access) -> BrokerUnavailable | None:
    """Demand that neither sending nor subscribing with *access* succeeds, or hangs."""
    broker, topic = _guarded(ctx, access), ctx.topic()
    if broker is None:
        return None
    within = ctx.limits.timeout + ctx.limits.lag
    sending = ctx.raises(BrokerUnavailable, ctx.send(broker, topic), f"sending with {access}")
    error = await ctx.within(within, sending, "being refused")
    subscribing = ctx.raises(BrokerUnavailable, ctx.reading(broker, topic).__aenter__(), f"subscribing with {access}")
    await ctx.within(within, subscribing, "being refused")
    return error


@scenario("SEC-01", "by TLS, with a certificate of a private authority", level="F", facilities=["security"], timeout=60)
async def encrypted(ctx: Context) -> None:
    """Catches options of TLS that reach only one of a transport's connections."""
    broker, topic = ctx.closing(ctx.harness.guarded("granted")), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    ctx.check(await _is_kept_out(ctx, "plain"), "the service knows no plain access, so nothing was proved")


@scenario(
    "SEC-02", "a service that is not who it says is not talked to", level="F", facilities=["security"], timeout=90
)
async def verified(ctx: Context) -> None:
    """Catches a certificate that is not verified, and a way back to plain text."""
    kinds: tuple[Access, ...] = ("unknown authority", "wrong host", "expired")
    refused = [await _is_kept_out(ctx, access) for access in kinds]
    ctx.check(any(refused), "the harness has no service with a certificate that is wrong, so nothing was proved")


@scenario("SEC-03", "a wrong password is refused in time", level="F", facilities=["security"], timeout=60)
async def authenticated(ctx: Context) -> None:
    """Catches a client that tries for ever what will never do."""
    ctx.check(await _is_kept_out(ctx, "wrong password"), "the harness has no password that is wrong")


@scenario(
    "SEC-04", "who may only send sends, and who may only read reads", level="F", facilities=["security"], timeout=90
)
async def authorised(ctx: Context) -> None:
    """Catches a subscription that seems to be one and gets nothing, and a refusal that takes others along."""
    topic = ctx.topic()
    granted, within = ctx.closing(ctx.harness.guarded("granted")), ctx.limits.timeout + ctx.limits.lag
    silent, deaf = _guarded(ctx, "may not send"), _guarded(ctx, "may not read")
    ctx.check(
        silent is not None or deaf is not None, "the harness has nobody without permissions, so nothing was proved"
    )
    if silent is not None:
        async with ctx.reading(silent, topic) as reader:
            refused = ctx.raises(MessageRejected, ctx.send(silent, topic), "sending without permission")
            await ctx.within(within, refused, "being refused")
            messages = await ctx.send(granted, topic, 5)
            await reader.take(5)
        ctx.ledger.compare(reader.name, messages).verify()
    if deaf is not None:
        subscribing = ctx.reading(deaf, topic).__aenter__()
        shut_out = ctx.raises(AccessRefused, subscribing, "subscribing without permission")
        await ctx.within(within, shut_out, "being refused")
        await ctx.use(deaf, topic)


@scenario("SEC-05", "a password is seen nowhere", level="F", facilities=["security"], timeout=60)
async def secret(ctx: Context) -> None:
    """Catches an address in a log, a repr or an error."""
    seen: list[str] = []
    with _Listening(seen):
        for access in ("granted", "unknown authority", "plain"):
            broker = _guarded(ctx, access)
            if broker is not None:
                seen += [repr(broker), str(broker), repr(vars(broker)) if hasattr(broker, "__dict__") else ""]
                try:
                    await ctx.use(broker)
                except (BrokerUnavailable, OutcomeUnknown) as error:
                    ctx.check(access != "granted", f"the right password was refused: {error}")
                    seen += traceback.format_exception(error)
                else:
                    ctx.check(access == "granted", f"with {access} it was let in, so nothing was proved")
    told = [each for each in seen if ctx.harness.password in each]
    ctx.same([each.replace(ctx.harness.password, "*****") for each in told], [], "where the password was seen")


class _Listening(logging.Handler):
    """Notes everything that diator logs."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._seen = seen
        self._logger = logging.getLogger("diator")

    def emit(self, record: logging.LogRecord) -> None:
        self._seen.append(f"{record.getMessage()} {record.exc_info or ''}")

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
        self._logger.removeHandler(self)


@scenario(
    "SEC-09",
    "headers of a sender are not taken for the transport's own word",
    level="F",
    needs=Capabilities(settlement="cumulative", dead_letter=True),
    facilities=["dead_letters"],
    timeout=30,
)
async def forged(ctx: Context) -> None:
    """Catches an attempt, a group or a reason that whoever sends can make up."""
    broker, topic, group = await ctx.broker(), ctx.topic(), ctx.name()
    forgeries = {
        "attempt": "99",
        "diator-attempt": "99",
        "x-delivery-count": "99",
        "x-death": "[]",
        "reason": "forged",
        "diator-dlq-reason": "forged",
        "diator-dlq-version": "99",
        "body": "forged",
    }
    async with ctx.reading(broker, topic, group=group) as reader:
        message = ctx.message(topic, headers=forgeries)
        try:
            await ctx.send_all(broker, [message])
        except (BrokerError, EncodingError):
            return  # to refuse such names is as good
        received = (await reader.take(1, settle="nothing"))[0]
        ctx.same(received.message, message, "the message")
        ctx.same(received.delivery.attempt, 1, "its attempt")
        await received.delivery.dead_letter("the true reason")
        await reader.until_fence()
    letters = await ctx.harness.dead_letters(broker, topic, group)
    ctx.same([letter.reason for letter in letters], ["the true reason"], "why it was put aside")
