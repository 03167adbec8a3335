"""How deliveries are settled: acknowledgements in batches, and what a dead letter says about its message."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import pytest

from diator.brokers.base import Delivery, Topic
from diator.brokers.settling import OMITTED, Acknowledgements, confirmed, dead_letter_headers, send_dead_letter
from diator.context import ContextFilter, correlated
from diator.exceptions import BrokerUnavailable, ConfigurationError, MessageRejected
from tests.records import fields


async def test_a_batch_is_sent_after_100_items_or_after_a_short_time():
    sent = []

    async def send(items):
        sent.append([*items])

    acknowledgements = Acknowledgements(send, {"group": "g"})
    for number in range(103):
        acknowledgements.add(number)
    await asyncio.sleep(0)
    assert sent == [[*range(100)]]
    await asyncio.sleep(0.1)
    assert sent == [[*range(100)], [100, 101, 102]]


@pytest.mark.parametrize("kind", [BrokerUnavailable, ConfigurationError])
async def test_a_failed_batch_is_logged_and_flush_raises_nothing(kind, caplog):
    async def send(items):
        raise kind("connection lost")

    acknowledgements = Acknowledgements(send, {"group": "g"})
    acknowledgements.add("a")
    acknowledgements.add("b")
    await acknowledgements.flush()

    assert caplog.record_tuples == [
        (
            "diator.brokers.settling",
            logging.WARNING,
            "2 acknowledgements did not reach the service; their messages will be redelivered: connection lost",
        )
    ]
    assert fields(caplog.records[0]) == {"group": "g", "messages": 2, "error_type": kind.__name__}


@pytest.mark.parametrize("items", [1, 100])
async def test_a_failed_batch_is_logged_as_of_no_message(items, caplog):
    async def send(items):
        raise BrokerUnavailable("connection lost")

    caplog.handler.addFilter(adds_fields := ContextFilter())
    acknowledgements = Acknowledgements(send, {"group": "g"})
    with correlated("of-the-last"):
        for number in range(items):
            acknowledgements.add(number)
    await asyncio.sleep(0.1)
    caplog.handler.removeFilter(adds_fields)

    assert [record.correlation_id for record in caplog.records] == [None]
    what = "1 acknowledgement did not reach the service; its message" if items == 1 else "100 acknowledgements did not"
    assert caplog.messages[0].startswith(what)


async def test_every_batch_is_sent_after_a_short_time():
    """And not only the first one: each batch starts a timer of its own."""
    sent = []

    async def send(items):
        sent.append([*items])

    acknowledgements = Acknowledgements(send, {"group": "g"})
    for number in (1, 2, 3):
        acknowledgements.add(number)
        await asyncio.sleep(0.1)

    assert sent == [[1], [2], [3]]


async def test_a_full_batch_does_not_shorten_the_time_of_the_next_one():
    sent = []

    async def send(items):
        sent.append(len(items))

    acknowledgements = Acknowledgements(send, {"group": "g"})
    acknowledgements.add(0)
    await asyncio.sleep(0.0015)
    for number in range(1, 101):
        acknowledgements.add(number)
    await asyncio.sleep(0.001)
    assert sent == [100]
    await asyncio.sleep(0.0015)
    assert sent == [100, 1]


# -- dead letters ----------------------------------------------------------------------------------------------------


def delivery(**options):
    return Delivery(
        **{"topic": Topic("event", "counted"), "body": b"", "headers": {}, "attempt": 1} | options, settler=None
    )


async def test_only_dead_letters_that_were_sent_are_confirmed():
    """Whether a send ends at once, later, with an error, or by a cancellation of its own."""
    at_once, later, failed, cancelled = (delivery(attempt=attempt) for attempt in (1, 2, 3, 4))

    async def send(seconds):
        await asyncio.sleep(seconds)

    async def fail():
        await asyncio.sleep(0.01)
        raise BrokerUnavailable("connection lost")

    given_up = asyncio.get_running_loop().create_future()
    given_up.cancel()
    sending = {at_once: send(0), failed: fail(), cancelled: given_up, later: send(0.02)}

    assert await confirmed(sending) == {at_once, later}


async def test_cancelling_the_wait_for_dead_letters_cancels_their_sends():
    sends = [asyncio.create_task(asyncio.Event().wait()) for _ in range(2)]
    waiting = asyncio.create_task(confirmed({delivery(attempt=number): each for number, each in enumerate(sends, 1)}))
    await asyncio.sleep(0.01)

    waiting.cancel()
    await asyncio.wait({waiting, *sends}, timeout=1)

    assert [each.cancelled() for each in (waiting, *sends)] == [True] * 3


THEIRS, ABOUT = {"tenant": "42", "diator-dlq-reason": "forged"}, {"diator-dlq-reason": "failed"}


@pytest.mark.parametrize(
    ("refusals", "body", "headers", "form", "omitted"),
    [
        (0, b"body", THEIRS, (b"body", {"tenant": "42"}), None),
        (1, b"body", THEIRS, (b"body", {}), "headers"),
        (2, b"body", THEIRS, (b"", {}), "body,headers"),
        (1, b"body", {}, (b"", {}), "body"),
        (1, b"", THEIRS, (b"", {}), "headers"),
    ],
)
@pytest.mark.parametrize("lacks", [[], ["key"]])
async def test_a_dead_letter_is_stored_with_as_much_as_the_service_takes(
    *, refusals, body, headers, form, omitted, lacks
):
    """No form is sent twice, and the header that names what is missing is there only if something is."""
    sent = []

    async def send(body, headers):
        sent.append((body, headers))
        if len(sent) <= refusals:
            raise MessageRejected("too large")

    await send_dead_letter(body, headers, ABOUT, send, omitted=lacks)

    missing = ",".join(sorted([*lacks, *(omitted.split(",") if omitted else ())]))
    body, theirs = form
    assert sent[-1] == (body, {**theirs, **ABOUT, **({OMITTED: missing} if missing else {})})
    assert len(sent) == refusals + 1 == len({str(each) for each in sent})


async def test_a_dead_letter_that_no_form_of_fits_raises_the_last_refusal():
    sent = []

    async def send(body, headers):
        sent.append(body)
        raise MessageRejected(f"refused {len(sent)} times")

    with pytest.raises(MessageRejected, match="refused 3 times"):
        await send_dead_letter(b"body", THEIRS, ABOUT, send)


async def test_another_error_than_a_refusal_of_a_dead_letter_is_raised_at_once():
    async def send(body, headers):
        sent.append(body)
        raise BrokerUnavailable("away")

    sent = []
    with pytest.raises(BrokerUnavailable):
        await send_dead_letter(b"body", THEIRS, ABOUT, send)
    assert len(sent) == 1


def test_a_dead_letter_says_why_when_and_from_where():
    headers = dead_letter_headers(
        delivery(attempt=3), "undecodable: empty", source="orders", group="billing", entry_id="7-0"
    )

    failed_at = datetime.fromisoformat(headers.pop("diator-dlq-last-failed-at"))
    assert timedelta() <= datetime.now(UTC) - failed_at < timedelta(minutes=1)
    assert headers == {
        "diator-dlq-version": "1",
        "diator-dlq-reason": "undecodable: empty",
        "diator-dlq-source": "orders",
        "diator-dlq-consumer-group": "billing",
        "diator-dlq-attempts": "3",
        "diator-dlq-entry-id": "7-0",
    }
