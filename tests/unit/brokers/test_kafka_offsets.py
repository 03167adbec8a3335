"""What is committed of a partition, and what the next consumer knows from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiokafka")

from diator.brokers.kafka import _offsets
from diator.brokers.kafka._offsets import DELAYS, TOPIC_ID_LENGTH, Offsets, delay_bucket, longest_delay
from diator.retrying import RetryPolicy

WEEK = 7 * 24 * 3600.0


def taken(*offsets, position=0):
    partition = Offsets(position)
    for offset in offsets:
        partition.take(offset)
    return partition


def test_nothing_taken_is_nothing_to_commit():
    assert Offsets(7).progress() == (7, "")


def test_unfinished_neighbours_need_no_metadata():
    """A commit without metadata is that of a program without diator, and the usual one."""
    assert taken(5, 6, 7, position=5).progress() == (5, "")


def test_offsets_finished_in_order_are_committed():
    partition = taken(5, 6, 7, position=5)

    partition.finish(5)
    partition.finish(6)

    assert partition.progress() == (7, "")


def test_a_gap_is_never_committed():
    """5 to 9 are done and 4 is running: a commit of 10 would skip 4, which must be redelivered."""
    partition = taken(*range(4, 10), position=4)

    for offset in range(5, 10):
        partition.finish(offset)

    assert partition.progress()[0] == 4
    assert partition.spread == 6


def test_holes_are_no_obstacle():
    """A compacted topic, and a topic with transactions, has offsets without a message."""
    partition = taken(3, 8, 11, position=1)

    for offset in (3, 8, 11):
        partition.finish(offset)

    assert partition.progress() == (12, "")


def test_offsets_finished_above_the_commit_are_not_redelivered():
    partition = taken(*range(10))
    for offset in (0, 3, 4, 7, 9):
        partition.finish(offset)

    later = Offsets(*partition.progress())

    assert [offset for offset in range(1, 12) if later.take(offset)] == [1, 2, 5, 6, 8, 10, 11]


def test_the_state_of_an_earlier_consumer_is_written_until_it_was_read():
    partition = taken(*range(20))
    for offset in range(10, 20):
        partition.finish(offset)
    second = Offsets(*partition.progress())
    second.take(0)
    second.take(1)
    second.finish(0)

    third = Offsets(*second.progress())

    assert [offset for offset in range(1, 22) if third.take(offset)] == [*range(1, 10), 20, 21]


def test_an_unfinished_offset_between_finished_ones_stays_unfinished():
    partition = taken(*range(20))
    for offset in range(10, 20):
        partition.finish(offset)
    second = Offsets(*partition.progress())
    for offset in range(15):
        second.take(offset)

    third = Offsets(*second.progress())

    assert [offset for offset in range(22) if third.take(offset)] == [*range(10), 20, 21]


def test_attempts_outlive_a_rebalance():
    partition = taken(0, 1, 2)
    assert partition.requeue(1) == 2
    assert partition.requeue(1) == 3
    partition.finish(0)

    later = Offsets(*partition.progress())

    assert [later.take(1), later.take(2)] == [3, 1]


def test_attempts_of_unread_messages_are_kept():
    partition = taken(0, 1, 2)
    partition.requeue(2)
    second = Offsets(*partition.progress())
    second.take(0)

    third = Offsets(*second.progress())

    assert [third.take(0), third.take(1), third.take(2)] == [1, 1, 2]


def test_the_attempt_of_a_message_is_known_until_it_is_finished():
    partition = taken(0, 1)
    partition.requeue(1)

    assert [partition.attempt(0), partition.attempt(1)] == [1, 2]
    partition.finish(1)
    assert partition.attempt(1) == 1


def test_what_an_earlier_consumer_has_finished_is_written_once():
    later = Offsets(0, "1 1+2")

    assert [later.take(offset) for offset in range(3)] == [1, 0, 0]
    assert later.progress() == (0, "1 1+2")


@pytest.mark.parametrize("room", range(11))
def test_the_metadata_has_the_room_that_the_id_of_the_topic_leaves(room, monkeypatch):
    monkeypatch.setattr(_offsets, "MAX_COMMIT_METADATA", TOPIC_ID_LENGTH + room)
    partition = taken(*range(4))
    partition.finish(1)
    partition.finish(3)

    _, metadata = partition.progress()

    assert len(metadata) <= room
    assert "1 1+1 3+1".startswith(metadata)
    assert room < 10 or metadata == "1 1+1 3+1"


def test_an_offset_is_taken_once():
    partition = taken(0, 1)

    assert [partition.take(0), partition.take(1), partition.take(2)] == [0, 0, 1]


def test_finishing_an_unknown_offset_changes_nothing():
    partition = taken(0)

    partition.finish(99)

    assert partition.progress() == (0, "")


@pytest.mark.parametrize(
    "written",
    [
        "",
        "1",
        "2 3+4",
        "other",
        '{"owner": "other"}',
        "1 x+y",
        "1 5+",
        "1 3",
        "1 :",
        " ",
        "1 3+4 ",
        "1 -3+4",
        "1  3+4",
        "1 3:0",
        "1 3+99999999",
        "1 3:99999999",
        "1 " + "9" * 5_000 + "+1",
        "1 3+4 x",
        "1 ٣+٤",
        "1" + " 3+4" * 2_000,
        "1 3+4\n",
    ],
)
def test_metadata_of_another_program_is_ignored(written):
    partition = Offsets(10, written)

    assert [partition.take(offset) for offset in (10, 13, 14, 15)] == [1, 1, 1, 1]


def test_state_without_room_is_redelivered():
    """Kafka accepts 4,096 characters of metadata, and refuses a commit with more."""
    partition = taken(*range(20_000))
    for offset in range(1, 20_000, 2):
        partition.finish(offset)

    lowest, written = partition.progress()
    later = Offsets(lowest, written)
    again = {offset for offset in range(20_000) if later.take(offset)}

    assert lowest == 0
    assert len(written) <= 4_096
    assert again > {*range(0, 20_000, 2)}
    assert again < {*range(20_000)}


@given(st.lists(st.tuples(st.sampled_from(["take", "finish", "requeue", "rebalance"]), st.integers(0, 30))))
def test_no_message_is_lost_and_no_finished_one_is_redelivered(steps):
    """In any order of steps, over any number of rebalances."""
    partition = Offsets(0)
    finished: set[int] = set()
    attempts: dict[int, int] = {}
    out: dict[int, int] = {}
    expected = 0
    for step, number in steps:
        if step == "take":
            attempt = partition.take(expected)
            assert bool(attempt) == (expected not in finished)
            if attempt:
                assert attempt == attempts.get(expected, 1)
                out[expected] = attempt
            expected += 1
        elif step == "rebalance":
            lowest, written = partition.progress()
            assert all(offset in finished for offset in range(lowest))
            partition, out, expected = Offsets(lowest, written), {}, lowest
        elif out:
            offset = [*out][number % len(out)]
            if step == "finish":
                partition.finish(offset)
                finished.add(offset)
                del out[offset]
            else:
                attempts[offset] = partition.requeue(offset)


@given(st.one_of(st.text(), st.from_regex(r"1( \d{1,20}[:+]\d{1,20})*", fullmatch=True)))
def test_no_metadata_hides_what_is_far_away(written):
    """Whatever another program writes to the commits of the group."""
    partition = Offsets(10, written)

    assert all(1 <= partition.take(offset) < 10_000_000 for offset in (30_000_000, 30_000_001))
    assert len(partition.progress()[1]) <= 4_096


@pytest.mark.parametrize(
    ("number", "partitions", "longest"),
    [(0, 7, 1.0), (5, 7, 1024.0), (6, 7, WEEK), (4, 6, 256.0), (5, 6, WEEK), (0, 1, WEEK)],
)
def test_a_retry_is_not_due_later_than_its_bucket_allows(number, partitions, longest):
    """The last partition has all longer delays, however many there are."""
    assert longest_delay(number, partitions) == longest


def test_no_delay_of_the_default_policy_is_in_the_bucket_without_a_limit():
    assert delay_bucket(RetryPolicy().max_delay) < len(DELAYS)


@pytest.mark.parametrize(("after", "where"), [(0.0, 0), (1.0, 0), (1.01, 1), (15.0, 2), (256.0, 4), (9e9, len(DELAYS))])
def test_a_retry_waits_in_the_bucket_of_its_delay(after, where):
    assert delay_bucket(after) == where
