"""Entries, keys and groups that another program writes, changes or removes. None of them stops another message."""

import asyncio

import msgspec
import pytest
from redis.asyncio import Redis

from diator.brokers.codec import encode
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import AccessRefused, ConfigurationError, MessageRejected
from diator.retrying import RetryPolicy
from tests.integration.redis_streams.helpers import (
    LONG,
    acked,
    consuming,
    dead_letters,
    eventually,
    message,
    nothing_comes,
    nothing_left,
    number_of,
    send,
    subscribed,
    take,
)
from tests.records import fields

ONCE = RetryPolicy(immediate_retries=0, delayed_retries=0)
LAST_ID = "18446744073709551615-18446744073709551615"

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def settle(admin, stream):
    """Requeue one held delivery and dead-letter the other, and check that neither is lost."""

    async def settle(deliveries, requeued, dead) -> None:
        await requeued.retry(after=0.1)
        await dead.dead_letter("bad")
        [again] = await take(deliveries, 1)
        assert (number_of(again), again.attempt) == (number_of(requeued), 2)
        await again.ack()
        [letter] = await dead_letters(admin, stream)
        assert letter[b"body"] == dead.body
        assert letter[b"diator-dlq-entry-id"] == dead.token.id

    return settle


# -- entries that are removed while they are handled -------------------------------------------------------------


@pytest.mark.parametrize("renewals", [0, 2, 5])
async def test_an_entry_that_is_trimmed_while_it_is_handled(*, broker, admin, stream, settle, renewals) -> None:
    """Renewing its lease takes it out of the group, so only this consumer has it. It is settled all the same."""
    async with subscribed(broker) as deliveries:
        await send(broker, 0, 1, 2)
        held = await take(deliveries, 3)
        await admin.xtrim(stream, maxlen=0, approximate=False)
        await admin.xautoclaim(stream, "billing", "another", 3_600_000)  # the group forgets it
        await asyncio.sleep(renewals * broker._options.lease / 3 + 0.1)
        await settle(deliveries, *held[:2])
        await held[2].ack()
    await nothing_left(admin, stream)


async def test_a_retried_message_that_is_trimmed_while_it_is_handled(broker, admin, stream, settle) -> None:
    async with subscribed(broker) as deliveries:
        await send(broker, 0)
        await (await take(deliveries, 1))[0].retry()
        [held] = await take(deliveries, 1)
        await admin.xtrim(f"{stream}:billing:again", maxlen=0, approximate=False)
        await asyncio.sleep(broker._options.lease)
        await held.retry()
        [again] = await take(deliveries, 1)
        assert again.attempt == 3
        await again.dead_letter("bad")
    assert len(await dead_letters(admin, stream)) == 1


@pytest.mark.parametrize("wait", [0.0, 1.0])
async def test_a_stream_that_is_deleted_while_its_entries_are_handled(*, make, redis_url, admin, stream, settle, wait):
    """The messages that a consumer holds are not lost. That others may be is a gap."""
    gaps = []
    broker = await make(redis_url, lease=LONG)
    async with subscribed(broker, on_gap=gaps.append) as deliveries:
        await send(broker, 0, 1)
        held = await take(deliveries, 2)
        await admin.delete(stream)
        await asyncio.sleep(wait)
        await settle(deliveries, *held)
        await send(broker, 2)
        assert await acked(deliveries, 1) == [2]
    assert len(gaps) == 1


async def test_a_group_that_is_destroyed_while_its_entries_are_handled(broker, admin, stream) -> None:
    """They are delivered again by the new group, so settling them then has no effect."""
    gaps = []
    async with subscribed(broker, on_gap=gaps.append) as deliveries:
        await send(broker, 0, 1)
        held = await take(deliveries, 2)
        await admin.xgroup_destroy(stream, "billing")
        assert await acked(deliveries, 2) == [0, 1]
        await nothing_left(admin, stream)
        await held[0].retry()
        await held[1].dead_letter("bad")
        await nothing_comes(deliveries)
    assert not await dead_letters(admin, stream)
    assert len(gaps) == 1


async def test_an_entry_that_is_removed_before_a_dead_consumer_could_handle_it(broker, admin, stream, caplog) -> None:
    """The gap begins when the entry was sent; the others are handled."""
    gaps = []
    await send(broker, *range(3))
    entries = await admin.xrange(stream)
    await admin.xgroup_create(stream, "billing", "0")
    await admin.xreadgroup("billing", "dead", {stream: ">"})
    await admin.xdel(stream, entries[1][0])
    async with subscribed(broker, on_gap=gaps.append) as deliveries:
        assert sorted(await acked(deliveries, 2)) == [0, 2]

        async def reported() -> bool:
            return bool(gaps)

        await eventually(reported)
    assert int(gaps[0].since.timestamp() * 1000) == int(entries[1][0].partition(b"-")[0])
    what = f"1 message of {stream} was removed from the stream before it was acknowledged"
    assert gaps[0].reason == what
    [record] = [each for each in caplog.records if each.getMessage() == what]
    assert fields(record).items() > {"group": "billing", "source": stream, "messages": 1, "reason": what}.items()


# -- entries that others write -----------------------------------------------------------------------------------


async def test_an_entry_passes_on_byte_for_byte(broker, admin, stream) -> None:
    """Names, order and duplicates: requeued, dead-lettered, moved back as operators do it, and dead-lettered again."""
    odd = [
        b"\xff\xfe",
        b"\x00",
        b"key",
        b"k",
        b"body",
        b"{}",
        b"body",
        b"another",
        b"",
        b"",
        b"key",
        b"\xff",
        b"attempt",
        b"99",
    ]
    odd += [b"diator-dlq-reason", b"forged", b"diator-dlq-attempts", b"77"]

    async def last_dead() -> list[bytes]:
        [[_, fields], *_] = await admin.execute_command(b"XREVRANGE", f"{stream}:billing:dead", "+", "-", "COUNT", "1")
        return fields

    async with subscribed(broker) as deliveries:
        await admin.execute_command("XADD", stream, "*", *odd)
        [delivery] = await take(deliveries, 1)
        assert (delivery.attempt, delivery.body) == (1, b"{}")
        await delivery.retry(after=0.1)
        [delivery] = await take(deliveries, 1)
        assert (delivery.attempt, delivery.body) == (2, b"{}")
        await delivery.dead_letter("bad")
        dead = await last_dead()
        assert dead[: len(odd)] == odd

        await admin.execute_command("XADD", stream, "*", *dead)
        [redriven] = await take(deliveries, 1)
        assert (redriven.attempt, redriven.body) == (1, b"{}")
        await redriven.dead_letter("bad again")
        assert (await last_dead())[: len(dead)] == dead
        assert (await last_dead())[len(dead) :][2:4] == [b"diator-dlq-reason", b"bad again"]
    await nothing_left(admin, stream)


async def test_an_entry_of_many_fields(broker, admin, stream) -> None:
    """More than a script can pass on: it is dead-lettered whole, with a trimmed one beside it."""
    fields = [part for n in range(50_000) for part in (b"field-%d" % n, b"x")]
    handled = []
    await admin.execute_command("XADD", stream, "*", *fields)
    await send(broker, 1)
    async with consuming(broker, lambda event: handled.append(event.number), retry=ONCE):
        await eventually(lambda: admin.exists(f"{stream}:billing:dead"))
        await nothing_left(admin, stream)
    [[_, dead]] = await admin.execute_command(b"XRANGE", f"{stream}:billing:dead", "-", "+")
    assert dead[: len(fields)] == fields
    assert handled == [1]


async def test_a_large_entry_is_copied_inside_of_redis(make, private_redis, stream) -> None:
    """Dead-lettering it does not write it to the connection that everybody uses."""
    broker, handled = await make(private_redis.url, lease=LONG), []
    async with Redis.from_url(private_redis.url, protocol=2) as admin:
        await admin.xadd(stream, {"body": b"x" * 32 * 1024 * 1024})
        await send(broker, 1)
        before = (await admin.info("stats"))["total_net_input_bytes"]
        async with consuming(broker, lambda event: handled.append(event.number), retry=ONCE):
            await eventually(lambda: admin.exists(f"{stream}:billing:dead"))
            await nothing_left(admin, stream)
        assert (await admin.info("stats"))["total_net_input_bytes"] - before < 1024 * 1024
        assert [len(letter[b"body"]) for letter in await dead_letters(admin, stream)] == [32 * 1024 * 1024]
    assert handled == [1]


async def test_a_dead_letter_that_redis_refuses_is_stored_without_its_content(
    broker, admin, stream, monkeypatch
) -> None:
    """It says where the entry is, which stays in its stream."""
    async with subscribed(broker) as deliveries:
        await admin.xadd(stream, {f"field-{n}": "x" for n in range(10_000)})
        [delivery] = await take(deliveries, 1)
        execute = broker._service.execute

        async def refuse_large(*command, **options):
            if command[0] == b"XADD":
                raise MessageRejected("Redis refused it (ResponseError: XADD: elements are too large to be stored)")
            return await execute(*command, **options)

        monkeypatch.setattr(broker._service, "execute", refuse_large)
        monkeypatch.setattr(delivery.settler.group, "execute", refuse_large)
        await delivery.dead_letter("bad")
    [letter] = await dead_letters(admin, stream)
    assert letter[b"diator-dlq-omitted"] == b"body,headers,key"
    assert letter[b"diator-dlq-reason"] == b"bad"
    assert await admin.xrange(stream, letter[b"diator-dlq-entry-id"], letter[b"diator-dlq-entry-id"])
    await nothing_left(admin, stream)


async def test_ids_of_the_far_future(broker, admin, stream) -> None:
    """They are delivered like others. After the last possible id, Redis refuses every send, with that reason."""
    async with subscribed(broker) as deliveries:
        for number, id_ in enumerate(["16725225600000000-0", LAST_ID]):
            await admin.xadd(stream, {"body": encode(message(number))}, id=id_)
        assert await acked(deliveries, 2) == [0, 1]
        with pytest.raises(MessageRejected, match="exhausted the last possible ID"):
            await send_one(broker)
    await nothing_left(admin, stream)


async def send_one(broker) -> None:
    await broker.send_message(message(1))


# -- keys of the group that others write -------------------------------------------------------------------------


def kept(**fields) -> bytes:
    """Return a waiting message, as diator writes it, with some fields forged."""
    own = {"fields": [(b"body", encode(message(7)))], "attempt": 2, "origin": "1-1"}
    return msgspec.msgpack.encode(own | fields)


async def test_forged_retries_do_not_stop_real_ones(broker, admin, stream) -> None:
    """What diator did not write is an ordinary message, due or not. It is never taken for a late attempt."""
    delayed, seen = f"{stream}:billing:delayed", []
    garbage = [b"", b"\xc1", b"{}", b"\x00" * 100_000, kept(origin="x"), kept(origin="1-1\n"), kept(attempt=10**12)]
    garbage += [kept(attempt=-5), kept(attempt=2.5), kept(fields=[(b"a",)]), kept(fields="x")]
    await admin.zadd(delayed, dict.fromkeys(garbage, "-inf"))
    far = ["inf", "+inf", "95617584000000", "1e300"]
    await admin.zadd(delayed, {b"far-%d" % n: far[n % len(far)] for n in range(200)})
    async with subscribed(broker) as deliveries:
        await send(broker, 1)
        for _ in range(len(garbage) + 2):
            [delivery] = await take(deliveries, 1)
            seen.append((delivery.attempt, delivery.body))
            if delivery.body.endswith(b'{"number":1}}') and delivery.attempt == 1:
                await delivery.retry(after=0.1)
            else:
                await delivery.dead_letter("bad")
    assert sorted(attempt for attempt, _ in seen) == [1] * (len(garbage) + 1) + [2]
    assert await admin.zcard(delayed) == 200
    assert len(await dead_letters(admin, stream)) == len(garbage) + 1


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("delayed", "is not a zset"),
        ("again", "is not a stream"),
        ("dead", "is not a stream"),
        ("full", "last possible id"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
async def test_a_key_of_the_group_that_is_something_else(*, broker, admin, stream, what, problem, late) -> None:
    """The error names the key, at the start of a subscription or when it reconnects."""
    key = f"{stream}:billing:{'dead' if what == 'full' else what}"

    async def spoil() -> None:
        await admin.delete(key)
        await (admin.xadd(key, {"a": "b"}, id=LAST_ID) if what == "full" else admin.set(key, "x"))

    if not late:
        await spoil()
        with pytest.raises(ConfigurationError, match=problem):
            async with subscribed(broker):
                pass
        return
    async with subscribed(broker) as deliveries:
        await send(broker, 1, 2)
        held = await take(deliveries, 2)
        await spoil()
        fails = held[0].dead_letter("bad") if what in ("dead", "full") else take(deliveries, 1)
        with pytest.raises(ConfigurationError, match=problem):
            await fails


async def test_a_user_who_may_not_write_dead_letters_is_refused_at_once(redis_url, admin, prefix, stream) -> None:
    user = prefix.replace("-", "")
    await admin.execute_command("ACL", "SETUSER", user, "on", ">pw", "+@all", f"~{stream}", f"~{stream}:billing:again")
    url = redis_url.replace("//", f"//{user}:pw@")
    try:
        async with RedisStreamMessageBroker(url, prefix) as broker:
            with pytest.raises(AccessRefused, match="permission"):
                async with subscribed(broker):
                    pass
    finally:
        await admin.acl_deluser(user)
