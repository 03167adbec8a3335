"""One timer for many deadlines has the effect of a timer for each."""

import asyncio

import pytest

from diator._deadlines import Deadlines

pytestmark = pytest.mark.usefixtures("loop_clock")


def running() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def within(deadlines: Deadlines, seconds: float) -> None:
    with deadlines.limit(running()):
        await asyncio.sleep(seconds)


async def test_code_that_takes_too_long_is_cancelled():
    with pytest.raises(TimeoutError):
        await within(Deadlines(0.01), 10)

    assert not running().cancelling()


async def test_each_task_has_its_own_deadline():
    """A task that began later is not ended together with the first one, nor by the timer of the first one."""
    deadlines = Deadlines(0.1)
    first = asyncio.create_task(within(deadlines, 10))
    await asyncio.sleep(0.07)
    second = asyncio.create_task(within(deadlines, 0.07))
    third = asyncio.create_task(within(deadlines, 10))

    await asyncio.wait({first, second, third}, timeout=1)

    assert second.exception() is None
    assert isinstance(first.exception(), TimeoutError)
    assert isinstance(third.exception(), TimeoutError)


async def test_the_timer_starts_again_after_a_pause():
    deadlines = Deadlines(0.02)
    await within(deadlines, 0)
    await asyncio.sleep(0.05)

    with pytest.raises(TimeoutError):
        await within(deadlines, 10)


async def test_code_that_swallows_its_cancellation_fails_all_the_same_and_delays_no_other():
    deadlines = Deadlines(0.01)

    async def deaf() -> None:
        with deadlines.limit(running()):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                await asyncio.sleep(0.1)

    ignoring = asyncio.create_task(deaf())
    await asyncio.sleep(0.02)
    with pytest.raises(TimeoutError):
        await within(deadlines, 10)

    with pytest.raises(TimeoutError):
        await ignoring
    assert not ignoring.cancelling()


async def test_a_task_that_other_code_cancelled_stays_cancelled():
    deadlines = Deadlines(0.01)

    async def slow() -> None:
        with deadlines.limit(running()):
            try:
                await asyncio.sleep(10)
            finally:
                await asyncio.sleep(10)

    task = asyncio.create_task(slow())
    await asyncio.sleep(0.03)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_after_close_nothing_is_cancelled():
    deadlines = Deadlines(0.01)
    task = asyncio.create_task(within(deadlines, 0.05))
    await asyncio.sleep(0)

    deadlines.close()

    await task


async def test_a_deadline_is_entered_again_and_again_and_each_block_has_its_own_time():
    deadline = Deadlines(0.05).limit(running())
    for _ in range(3):
        with deadline:
            await asyncio.sleep(0.03)

    for _ in range(2):
        with pytest.raises(TimeoutError), deadline:
            await asyncio.sleep(10)
    await asyncio.sleep(0.1)  # outside of a block nothing is cancelled

    running().cancel()
    with pytest.raises(asyncio.CancelledError), deadline:
        await asyncio.sleep(0)  # cancelled by other code, and not a timeout because an earlier block was one
    running().uncancel()
