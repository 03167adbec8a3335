"""Warnings of a client library about diator's own connections are demoted, and those about the program's are not."""

import asyncio
import logging

import pytest

from diator.brokers.client_logs import demote, own_client


@pytest.fixture
def library():
    logger = logging.getLogger("diator-tests.library")
    demote(logger.name)
    yield logger
    logger.filters.clear()
    logger.setLevel(logging.NOTSET)


def levels(caplog):
    return [(record.message, record.levelname) for record in caplog.records]


async def test_what_the_library_logs_about_diator_is_demoted(library, caplog):
    library.setLevel(logging.DEBUG)
    with own_client():
        library.error("ours")
        library.info("in place")
    library.error("of the program")
    assert levels(caplog) == [("ours", "DEBUG"), ("in place", "INFO"), ("of the program", "ERROR")]


async def test_a_demoted_record_is_not_shown_where_debug_is_not(library, caplog):
    library.setLevel(logging.INFO)
    with own_client():
        library.error("ours")
    library.error("of the program")
    assert levels(caplog) == [("of the program", "ERROR")]


async def test_the_tasks_that_the_library_begins_belong_to_diator(library, caplog):
    library.setLevel(logging.INFO)

    async def read(whose):
        await asyncio.sleep(1)
        library.error(whose)

    with own_client():
        reading = asyncio.create_task(read("ours"))
    await asyncio.gather(reading, asyncio.create_task(read("of the program")))
    assert levels(caplog) == [("of the program", "ERROR")]
