"""The transport on the page about writing one keeps the contract: all of the suite that takes no proxy."""

import asyncio
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest

from diator.exceptions import BrokerUnavailable, MessageRejected, OutcomeUnknown

pytestmark = pytest.mark.timeout(300)

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-transport.md"


def program_of(path):
    """The Python blocks of a page as one module."""
    module = ModuleType("program_of_the_page")
    sys.modules[module.__name__] = module
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), path, "exec"), vars(module))  # what a reader does
    return module


page = program_of(PAGE)
TestTable = page.TestTable
TestTable.required = True


@asynccontextmanager
async def connection():
    yield "a connection"


@asynccontextmanager
async def no_connection():
    raise ConnectionRefusedError
    yield


@asynccontextmanager
async def slow_connection():
    await asyncio.sleep(5)
    yield


class Refused(Exception):
    pass


@pytest.mark.parametrize(
    ("connect", "error", "verdict"),
    [
        (no_connection, None, BrokerUnavailable),
        (slow_connection, None, BrokerUnavailable),
        (connection, Refused("hunter2"), MessageRejected),
        (connection, ConnectionResetError(), OutcomeUnknown),
        (connection, TimeoutError(), OutcomeUnknown),
    ],
)
async def test_what_happens_between_question_and_answer_decides_the_verdict(connect, error, verdict):
    message_id = uuid4()

    with pytest.raises(verdict) as caught:
        async with page.confirmed(connect, timeout=0.05, message_id=message_id, refusals=(Refused,)):
            raise error

    assert type(caught.value) is verdict
    assert caught.value.message_id == message_id
    assert "hunter2" not in str(caught.value)
