"""The table of unconfirmed calls: where each message is, and that each call ends once. No client, no event loop."""

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

pytest.importorskip("aiokafka")

from diator.brokers.kafka._unconfirmed import Batch, Call, Unconfirmed

FIRST, SECOND = "first producer", "second producer"
HERE, THERE = ("topic", 0), ("topic", 1)


def call(place=HERE, *, size=10, deadline=100.0, name=b"") -> Call:
    return Call(place, None, name, None, size, None, deadline, confirmed=None)


def calls(count, place=HERE, **options) -> list[Call]:
    return [call(place, **options) for _ in range(count)]


def table(max_in_flight=1_000, batch_bytes=1_000) -> Unconfirmed:
    return Unconfirmed(max_in_flight=max_in_flight, batch_bytes=batch_bytes)


def added(unconfirmed, several, producer=FIRST) -> list[Batch]:
    """Add *several* calls; returns the batches that were opened."""
    return [batch for each in several if (batch := unconfirmed.add(each, producer)) is not None]


# -- batches -----------------------------------------------------------------------------------------------------


def test_a_batch_takes_the_messages_of_its_partition_in_their_order():
    unconfirmed, several = table(), calls(3)
    (batch,) = added(unconfirmed, several)
    assert batch.calls == several
    assert (batch.place, batch.producer, batch.size) == (HERE, FIRST, 30)


def test_each_partition_has_a_batch_of_its_own():
    here, there = added(table(), [call(HERE), call(THERE), call(HERE)])
    assert (here.place, there.place) == (HERE, THERE)
    assert (len(here.calls), len(there.calls)) == (2, 1)


def test_what_a_batch_has_no_room_for_opens_another_one_and_nothing_passes_it():
    unconfirmed, several = table(batch_bytes=25), [call(size=20), call(size=10), call(size=5)]
    first, second = added(unconfirmed, several)
    assert (first.calls, second.calls) == (several[:1], several[1:])


def test_a_message_that_is_larger_than_a_batch_has_one_of_its_own():
    large, small = added(table(batch_bytes=25), [call(size=100), call(size=1)])
    assert (large.size, small.size) == (100, 1)


def test_a_batch_takes_nothing_once_it_is_sent():
    unconfirmed = table()
    (sent,) = added(unconfirmed, calls(1))
    assert sent.is_open
    sent.seal()
    assert (sent.is_open, sent.is_sent) == (False, True)
    (other,) = added(unconfirmed, calls(1))
    assert [len(batch.calls) for batch in (sent, other)] == [1, 1]


def test_a_message_that_goes_alone_joins_no_batch_and_no_message_joins_it():
    alone = call()
    alone.is_alone = True
    first, second, third = added(table(), [call(), alone, call()])
    assert [len(batch.calls) for batch in (first, second, third)] == [1, 1, 1]


def test_the_end_of_a_batch_ends_its_calls_and_the_next_message_opens_another():
    unconfirmed, several = table(), calls(2)
    (batch,) = added(unconfirmed, several)
    assert batch in unconfirmed
    assert unconfirmed.end(batch) == several
    assert batch not in unconfirmed
    assert added(unconfirmed, calls(1))


def test_the_end_of_a_sent_batch_leaves_the_next_one_of_its_partition_open():
    unconfirmed = table()
    (sent,) = added(unconfirmed, calls(1))
    sent.seal()
    added(unconfirmed, calls(1))
    unconfirmed.end(sent)
    assert added(unconfirmed, calls(1)) == []


# -- room --------------------------------------------------------------------------------------------------------


def test_room_is_counted_in_calls_until_they_end():
    unconfirmed = table(max_in_flight=2)
    (batch,) = added(unconfirmed, calls(1))
    assert not unconfirmed.is_full
    added(unconfirmed, calls(1))
    assert unconfirmed.is_full
    unconfirmed.retire(FIRST)
    assert unconfirmed.is_full  # they wait for the next producer
    (batch,) = unconfirmed.hand_over(SECOND)
    assert unconfirmed.in_flight == 2
    unconfirmed.end(batch)
    assert unconfirmed.in_flight == 0


# -- the next producer -------------------------------------------------------------------------------------------


def test_a_retired_producer_keeps_what_it_has_sent_and_the_next_one_gets_the_rest():
    unconfirmed, several = table(), calls(2)
    (sent,) = added(unconfirmed, calls(1))
    sent.seal()
    (unsent,) = added(unconfirmed, several)
    assert unconfirmed.retire(FIRST) == [unsent]
    assert unsent.calls == []  # aiokafka finds an empty batch, and sends nothing
    assert not unsent.is_open
    assert unconfirmed.waiting == several
    assert unconfirmed.batches == [sent]
    (batch,) = unconfirmed.hand_over(SECOND)
    assert (batch.producer, batch.calls, unconfirmed.waiting) == (SECOND, several, [])


def test_retiring_a_producer_leaves_the_batches_of_another_one():
    unconfirmed = table()
    first, second = added(unconfirmed, calls(1, HERE)), added(unconfirmed, calls(1, THERE), SECOND)
    assert unconfirmed.retire(FIRST) == first
    assert unconfirmed.batches == second


def test_a_producer_is_used_while_one_of_its_batches_has_not_ended():
    unconfirmed = table()
    (batch,) = added(unconfirmed, calls(1))
    batch.seal()
    unconfirmed.retire(FIRST)
    assert unconfirmed.is_used(FIRST)
    assert not unconfirmed.is_used(SECOND)
    unconfirmed.end(batch)
    assert not unconfirmed.is_used(FIRST)


def test_abandoning_a_producer_ends_its_calls_and_no_others():
    unconfirmed, first = table(), calls(2)
    (batch,) = added(unconfirmed, first)
    batch.seal()
    (other,) = added(unconfirmed, calls(1, THERE), SECOND)
    assert unconfirmed.abandon(FIRST) == first
    assert unconfirmed.batches == [other]
    assert unconfirmed.in_flight == 1


def test_waiting_calls_can_end_by_their_topic():
    unconfirmed, other = table(), ("other topic", 0)
    added(unconfirmed, [call(HERE), call(other), call(THERE)])
    unconfirmed.retire(FIRST)
    assert [each.place for each in unconfirmed.take_waiting("topic")] == [HERE, THERE]
    assert [each.place for each in unconfirmed.waiting] == [other]
    assert len(unconfirmed.take_waiting()) == 1
    assert (unconfirmed.waiting, unconfirmed.in_flight) == ([], 0)


# -- refused batches ---------------------------------------------------------------------------------------------


def test_a_batch_that_is_too_large_is_sent_in_halves_before_what_came_after_it():
    unconfirmed, refused, later = table(), calls(4), calls(1)
    (batch,) = added(unconfirmed, refused)
    batch.seal()
    added(unconfirmed, later)
    unconfirmed.split(batch, is_too_large=True)
    unconfirmed.retire(FIRST)
    assert unconfirmed.waiting == [*refused, *later]
    assert [len(each.calls) for each in unconfirmed.hand_over(SECOND)] == [2, 2, 1]


def test_a_batch_that_is_refused_later_still_goes_before_what_came_after_it():
    """Two partitions are under way, and both are refused."""
    unconfirmed, there, later = table(), calls(2, THERE), calls(1, THERE)
    here, first = added(unconfirmed, [*calls(2, HERE), *there])
    here.seal()
    first.seal()
    added(unconfirmed, later)
    unconfirmed.split(here, is_too_large=True)
    unconfirmed.retire(FIRST)
    unconfirmed.split(first, is_too_large=True)
    assert [each for each in unconfirmed.waiting if each.place == THERE] == [*there, *later]


def test_batches_never_grow_again():
    unconfirmed = table(batch_bytes=20)
    (batch,) = added(unconfirmed, [call(size=100)])
    unconfirmed.split(batch, is_too_large=True)
    unconfirmed.hand_over(SECOND)
    assert [len(each.calls) for each in added(unconfirmed, calls(3), SECOND)] == [2, 1]


def test_each_message_of_a_refused_batch_goes_alone():
    unconfirmed, refused, later = table(), calls(2), calls(2)
    (batch,) = added(unconfirmed, refused)
    batch.seal()
    added(unconfirmed, later)
    unconfirmed.split(batch, is_too_large=False)
    unconfirmed.retire(FIRST)
    batches = unconfirmed.hand_over(SECOND)
    assert [each.calls for each in batches] == [refused[:1], refused[1:], later]
    assert [each.is_open for each in batches] == [False, False, True]


# -- deadlines ---------------------------------------------------------------------------------------------------


def test_the_next_deadline_is_the_earliest_of_all_calls():
    unconfirmed = table()
    assert unconfirmed.next_deadline() is None
    added(unconfirmed, [call(HERE, deadline=5.0), call(HERE, deadline=6.0), call(THERE, deadline=3.0)])
    assert unconfirmed.next_deadline() == 3.0
    unconfirmed.retire(FIRST)
    assert unconfirmed.next_deadline() == 3.0


def test_a_producer_is_stuck_when_what_it_sent_is_overdue():
    unconfirmed = table()
    for batch in added(unconfirmed, [call(HERE, deadline=1.0), call(THERE, deadline=1.0)]):
        batch.seal()
    added(unconfirmed, [call(HERE, deadline=1.0)], SECOND)  # that is not sent
    assert unconfirmed.stuck(0.9) == []
    assert unconfirmed.stuck(1.0) == [FIRST]


def test_overdue_calls_that_were_not_sent_end_and_the_others_of_their_partition_are_sent_again():
    unconfirmed, late, early = table(), calls(1, deadline=1.0), calls(2, deadline=2.0)
    (batch,) = added(unconfirmed, [*late, *early])
    (other,) = added(unconfirmed, calls(1, THERE, deadline=2.0))
    assert unconfirmed.expire(0.9) == ([], [])
    assert unconfirmed.expire(1.0) == (late, [batch])
    assert unconfirmed.waiting == early
    assert unconfirmed.batches == [other]
    assert unconfirmed.in_flight == 3


def test_what_was_sent_does_not_expire_nor_what_is_behind_it():
    unconfirmed = table()
    (batch,) = added(unconfirmed, calls(1, deadline=1.0))
    batch.seal()
    added(unconfirmed, calls(1, deadline=3.0))
    assert unconfirmed.expire(2.0) == ([], [])


def test_overdue_calls_that_wait_for_a_producer_end():
    unconfirmed, late, early = table(), calls(1, deadline=1.0), calls(1, deadline=2.0)
    added(unconfirmed, [*late, *early])
    unconfirmed.retire(FIRST)
    assert unconfirmed.expire(1.0) == (late, [])
    assert unconfirmed.waiting == early


# -- all of it, in any order -------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """
    What happens to a producer of aiokafka, in any order.

    As with Kafka, one batch of a partition is sent at a time, the oldest one; a refused batch retires its producer; and
    another producer takes over when the old one has no batch any more.
    """

    def __init__(self):
        super().__init__()
        self.unconfirmed = table(max_in_flight=5, batch_bytes=30)
        self.now = 0.0
        self.number = 0
        self.producer: int | None = 0
        self.producers = 1
        self.open: list[Call] = []
        self.ended: list[Call] = []
        self.stored: dict = defaultdict(list)

    def end(self, several):
        for each in several:
            self.open.remove(each)  # which fails if it has ended before
            self.ended.append(each)

    def retire(self, producer):
        if producer == self.producer:
            self.producer = None
            for batch in self.unconfirmed.retire(producer):
                assert batch not in self.unconfirmed

    def sent(self):
        return [batch for batch in self.unconfirmed.batches if batch.is_sent]

    @precondition(lambda self: self.producer is not None and not self.unconfirmed.waiting)
    @rule(partition=st.integers(0, 1), size=st.sampled_from([5, 10, 40]), patience=st.integers(1, 5))
    def send(self, partition, size, patience):
        self.number += 1
        new = call(("topic", partition), size=size, deadline=self.now + patience, name=b"%d" % self.number)
        self.open.append(new)
        self.unconfirmed.add(new, self.producer)

    @rule(partition=st.integers(0, 1))
    def take_off(self, partition):
        """The producer sends the oldest batch of a partition, unless one of that partition is under way."""
        batches = [batch for batch in self.unconfirmed.batches if batch.place == ("topic", partition)]
        if batches and not batches[0].is_sent:
            batches[0].seal()

    @precondition(lambda self: self.sent())
    @rule(data=st.data())
    def confirm(self, data):
        batch = data.draw(st.sampled_from(self.sent()))
        self.stored[batch.place] += [int(each.value) for each in batch.calls]
        self.end(self.unconfirmed.end(batch))

    @precondition(lambda self: self.sent())
    @rule(data=st.data(), is_too_large=st.booleans())
    def refuse(self, data, is_too_large):
        batch = data.draw(st.sampled_from(self.sent()))
        if len(batch.calls) > 1:
            self.unconfirmed.split(batch, is_too_large=is_too_large)
        else:
            self.end(self.unconfirmed.end(batch))
        self.retire(batch.producer)

    @precondition(lambda self: self.sent())
    @rule(data=st.data())
    def break_down(self, data):
        producer = data.draw(st.sampled_from(self.sent())).producer
        self.retire(producer)
        self.end(self.unconfirmed.abandon(producer))
        assert not self.unconfirmed.is_used(producer)

    @precondition(lambda self: self.producer is None and not self.sent())
    @rule()
    def take_over(self):
        self.producer, self.producers = self.producers, self.producers + 1
        for batch in self.unconfirmed.hand_over(self.producer):
            assert batch.calls

    @precondition(lambda self: self.producer is not None and self.unconfirmed.waiting)
    @rule()
    def hand_over(self):
        self.unconfirmed.hand_over(self.producer)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds):
        self.now += seconds
        for producer in self.unconfirmed.stuck(self.now):
            self.retire(producer)
            self.end(self.unconfirmed.abandon(producer))
        self.end(self.unconfirmed.expire(self.now)[0])
        assert (self.unconfirmed.next_deadline() or self.now + 1) > self.now

    @precondition(lambda self: self.producer is None)
    @rule()
    def find_no_producer(self):
        self.end(self.unconfirmed.take_waiting())

    @invariant()
    def every_call_is_in_one_place(self):
        held = [each for batch in self.unconfirmed.batches for each in batch.calls] + self.unconfirmed.waiting
        assert sorted(map(id, held)) == sorted(map(id, self.open))
        assert self.unconfirmed.in_flight == len(self.open)
        assert self.unconfirmed.is_full == (len(self.open) >= 5)
        assert len(self.open) + len(self.ended) == self.number

    @invariant()
    def messages_of_a_partition_keep_their_order(self):
        for place in (HERE, THERE):
            waiting = [each for batch in self.unconfirmed.batches if batch.place == place for each in batch.calls]
            waiting += [each for each in self.unconfirmed.waiting if each.place == place]
            numbers = self.stored[place] + [int(each.value) for each in waiting]
            assert numbers == sorted(numbers)

    @invariant()
    def no_batch_is_empty_or_too_large(self):
        for batch in self.unconfirmed.batches:
            assert batch.calls
            assert batch.size == sum(each.size for each in batch.calls)
            assert len(batch.calls) == 1 or batch.size <= 30
            assert len(batch.calls) == 1 or not any(each.is_alone for each in batch.calls)

    def teardown(self):
        """However it went, all calls can be ended."""
        self.end([each for batch in self.unconfirmed.batches for each in self.unconfirmed.end(batch)])
        self.end(self.unconfirmed.take_waiting())
        assert (self.open, self.unconfirmed.in_flight, self.unconfirmed.next_deadline()) == ([], 0, None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=30)
