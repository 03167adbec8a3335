"""Acknowledgements go out together; those that did not arrive are logged, since nobody waits for them."""

import asyncio
import logging

from diator.brokers.settling import Acknowledgements
from diator.exceptions import BrokerUnavailable


async def test_they_are_told_together_within_a_moment_or_when_there_are_many():
    told = []

    async def tell(items):
        told.append([*items])

    acknowledgements = Acknowledgements(tell)
    for number in range(103):
        acknowledgements.add(number)
    await asyncio.sleep(0)
    assert told == [[*range(100)]]
    await asyncio.sleep(0.1)
    assert told == [[*range(100)], [100, 101, 102]]


async def test_what_could_not_be_told_is_said_in_the_log_and_no_error_of_the_flush(caplog):
    async def tell(items):
        raise BrokerUnavailable("connection lost")

    acknowledgements = Acknowledgements(tell)
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
