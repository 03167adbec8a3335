"""Acknowledgements are sent in batches. A failed batch is logged, because nobody waits for it."""

import asyncio
import logging

import pytest

from diator.brokers.settling import Acknowledgements
from diator.exceptions import BrokerUnavailable, ConfigurationError


async def test_a_batch_is_sent_after_100_items_or_after_a_short_time():
    sent = []

    async def send(items):
        sent.append([*items])

    acknowledgements = Acknowledgements(send)
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

    acknowledgements = Acknowledgements(send)
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
