"""Log lines of which one sender can cause thousands."""

import asyncio
import logging

from diator._log import MAX_LINES, PERIOD, RepeatedLines
from diator.context import ContextFilter, correlated
from tests.records import fields

LOGGER = logging.getLogger("tests.repeated")


def texts(caplog):
    return [record.getMessage() for record in caplog.records]


async def test_the_first_lines_of_a_kind_are_logged_at_once_and_the_others_counted(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    for number in range(10_000):
        lines.log(logging.ERROR, "it failed", "%d failed", number)

    assert texts(caplog) == [f"{number} failed" for number in range(MAX_LINES)]

    await asyncio.sleep(PERIOD)

    assert texts(caplog)[MAX_LINES:] == [f"it failed: and {10_000 - MAX_LINES:,} more in 60 s"]
    assert {record.levelname for record in caplog.records} == {"ERROR"}


async def test_each_kind_has_lines_of_its_own(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    for _ in range(MAX_LINES + 1):
        lines.log(logging.ERROR, "one", "one failed")
    lines.log(logging.ERROR, "another", "another failed")
    lines.log(logging.WARNING, "one", "one was slow")

    assert texts(caplog)[MAX_LINES:] == ["another failed", "one was slow"]

    lines.flush()

    assert texts(caplog)[MAX_LINES + 2 :] == ["one: and 1 more in 0 s"]


async def test_a_new_period_begins_with_the_next_line(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    for _ in range(3):
        for _ in range(MAX_LINES + 2):
            lines.log(logging.ERROR, "it failed", "it failed")
        await asyncio.sleep(PERIOD * 2)

    assert texts(caplog) == [*["it failed"] * MAX_LINES, "it failed: and 2 more in 60 s"] * 3


async def test_the_count_is_not_lost_at_the_end(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    for _ in range(MAX_LINES + 2):
        lines.log(logging.ERROR, "it failed", "it failed")
    await asyncio.sleep(15)

    lines.flush()
    lines.flush()

    assert texts(caplog)[MAX_LINES:] == ["it failed: and 2 more in 15 s"]
    for _ in range(MAX_LINES + 2):
        lines.log(logging.ERROR, "it failed", "it failed")
    await asyncio.sleep(PERIOD - 1)
    assert len(caplog.records) == 2 * MAX_LINES + 1  # the next period began with its own first line


async def test_without_further_lines_nothing_is_added(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    for _ in range(MAX_LINES):
        lines.log(logging.ERROR, "it failed", "it failed")
    lines.flush()

    assert texts(caplog) == ["it failed"] * MAX_LINES


async def test_the_summary_belongs_to_no_message(caplog):
    caplog.handler.addFilter(adds_fields := ContextFilter())
    lines = RepeatedLines(LOGGER, {"group": "g"})
    with correlated("of-the-first"):
        for _ in range(MAX_LINES + 1):
            lines.log(logging.ERROR, "it failed", "it failed")
    await asyncio.sleep(PERIOD)
    caplog.handler.removeFilter(adds_fields)

    assert [record.correlation_id for record in caplog.records] == ["of-the-first"] * MAX_LINES + [None]
    assert {record.group for record in caplog.records} == {"g"}
    assert (caplog.records[-1].more, caplog.records[-1].seconds) == (1, PERIOD)


async def test_a_line_has_the_fields_of_all_lines_and_its_own(caplog):
    lines = RepeatedLines(LOGGER, {"group": "g"})
    lines.log(logging.ERROR, "it failed", "it failed", fields=lambda: {"group": None, "reason": "odd"})

    assert fields(caplog.records[0]) == {"group": "g", "reason": "odd"}
