"""SEC: TLS, credentials, permissions and untrusted input."""

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
from diator.testing._suite.environment import EnvironmentMissing
from diator.testing.conformance._context import Context
from diator.testing.conformance._harness import Access
from diator.testing.conformance._scenario import scenario


def _guarded(ctx: Context, access: Access) -> Transport | None:
    """Return a broker with *access*, or None if the service does not have this kind of access."""
    try:
        return ctx.closing(ctx.harness.guarded(access))
    except EnvironmentMissing:
        return None


async def _is_kept_out(
    ctx: Context, access: Access, refusal: type[BrokerError] = BrokerUnavailable
) -> BrokerError | None:
    """Check that sending and subscribing with *access* are refused in time. Return the error of sending."""
    broker, topic = _guarded(ctx, access), ctx.topic()
    if broker is None:
        return None
    within = ctx.limits.timeout + ctx.limits.lag
    sending = ctx.raises(refusal, ctx.send(broker, topic), f"sending with {access}")
    error = await ctx.within(within, sending, "the refusal")
    subscribing = ctx.raises(refusal, ctx.reading(broker, topic).__aenter__(), f"subscribing with {access}")
    await ctx.within(within, subscribing, "the refusal")
    return error


@scenario(
    "SEC-01",
    "The transport connects by TLS with a certificate of a private authority",
    level="F",
    facilities=["security"],
    timeout=60,
)
async def encrypted(ctx: Context) -> None:
    """Catch TLS options that reach only one of a transport's connections."""
    broker, topic = ctx.closing(ctx.harness.guarded("granted")), ctx.topic()
    async with ctx.reading(broker, topic) as reader:
        messages = await ctx.send(broker, topic, 20)
        await reader.until_fence()
    ctx.ledger.compare(reader.name, messages).verify()
    ctx.check(await _is_kept_out(ctx, "plain"), "the service does not refuse plain text, so nothing was proved")


@scenario("SEC-02", "A service with a wrong certificate is refused", level="F", facilities=["security"], timeout=90)
async def verified(ctx: Context) -> None:
    """Catch a certificate that is not verified, and a fallback to plain text."""
    kinds: tuple[Access, ...] = ("unknown authority", "wrong host", "expired")
    refused = [await _is_kept_out(ctx, access) for access in kinds]
    ctx.check(any(refused), "the harness has no service with a wrong certificate, so nothing was proved")


@scenario("SEC-03", "A wrong password is refused in time", level="F", facilities=["security"], timeout=60)
async def authenticated(ctx: Context) -> None:
    """Catch a client that retries for ever with a password that is refused."""
    ctx.check(
        await _is_kept_out(ctx, "wrong password", AccessRefused),
        "the harness has no access with a wrong password, so nothing was proved",
    )


@scenario(
    "SEC-04",
    "A user who may only send can send, and a user who may only read can read",
    level="F",
    facilities=["security"],
    timeout=90,
)
async def authorised(ctx: Context) -> None:
    """Catch a subscription without permission that waits silently, and a refusal that affects other users."""
    topic = ctx.topic()
    granted, within = ctx.closing(ctx.harness.guarded("granted")), ctx.limits.timeout + ctx.limits.lag
    no_send, no_read = _guarded(ctx, "may not send"), _guarded(ctx, "may not read")
    ctx.check(
        no_send is not None or no_read is not None, "the harness has no user without permissions, so nothing was proved"
    )
    if no_send is not None:
        async with ctx.reading(no_send, topic) as reader:
            refused = ctx.raises(MessageRejected, ctx.send(no_send, topic), "sending without permission")
            await ctx.within(within, refused, "the refusal")
            messages = await ctx.send(granted, topic, 5)
            await reader.take(5)
        ctx.ledger.compare(reader.name, messages).verify()
    if no_read is not None:
        subscribing = ctx.reading(no_read, topic).__aenter__()
        shut_out = ctx.raises(AccessRefused, subscribing, "subscribing without permission")
        await ctx.within(within, shut_out, "the refusal")
        await ctx.use(no_read, topic)


@scenario("SEC-05", "A password appears nowhere", level="F", facilities=["security"], timeout=60)
async def secret(ctx: Context) -> None:
    """Catch an address with its password in a log line, a repr or an error."""
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
                    ctx.check(access == "granted", f"the access {access!r} was accepted, so nothing was proved")
    shown = [each for each in seen if ctx.harness.password in each]
    ctx.same([each.replace(ctx.harness.password, "*****") for each in shown], [], "the texts that show the password")


class _Listening(logging.Handler):
    """Records every log line of diator."""

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
    "Headers of a sender are not mistaken for headers of the transport",
    level="F",
    needs=Capabilities(settlement="cumulative", dead_letter=True),
    facilities=["dead_letters"],
)
async def forged(ctx: Context) -> None:
    """Catch an attempt, a group or a reason that a sender can forge."""
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
            return  # a transport may refuse such names
        received = (await reader.take(1, settle="nothing"))[0]
        ctx.same(received.message, message, "the message")
        ctx.same(received.delivery.attempt, 1, "the attempt")
        await received.delivery.dead_letter("the true reason")
        await reader.until_fence()
    letters = await ctx.harness.dead_letters(broker, topic, group)
    ctx.same([letter.reason for letter in letters], ["the true reason"], "the reasons of the dead letters")
