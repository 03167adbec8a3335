"""What a transport promises against what a program needs: every field, in both directions."""

from dataclasses import fields

import pytest

from diator.brokers.capabilities import Capabilities, require
from diator.exceptions import ConfigurationError, UnsupportedCapability

LEVELS = {
    "guarantee": ["at_most_once", "at_least_once"],
    "receipt": ["none", "accepted", "durable"],
    "settlement": ["none", "cumulative", "individual"],
    "delayed_retry": [False, True],
    "dead_letter": [False, True],
    "delivery_count": ["none", "retries", "exact"],
    "ordering": ["none", "key", "destination"],
    "ordered_retry": [False, True],
    "subscription": ["ephemeral", "durable"],
    "replay": ["none", "earliest", "position"],
    "durability": ["none", "restart", "crash"],
    "unroutable": ["dropped", "retained", "reported"],
    "headers": ["envelope", "native"],
    "backpressure": ["none", "prefetch", "pull"],
    "max_message_bytes": [0, 1_000, 1_000_000],
    "multi_process": [False, True],
}
"""Weakest first."""
SETS = {"redelivery": ["close", "crash", "deadline", "retry"], "distribution": ["broadcast", "competing"]}
TOLD = {"redelivery_bound": 1.5, "network": True}


def lacking(name, has, needs):
    return Capabilities(**{name: has}).missing(Capabilities(**{name: needs}))


def test_no_field_is_forgotten_here():
    assert {field.name for field in fields(Capabilities)} == {*LEVELS, *SETS, *TOLD}


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_covers_itself_and_the_weaker_ones(name):
    for rank, has in enumerate(LEVELS[name]):
        assert [lacking(name, has, needs) == [] for needs in LEVELS[name]] == [
            needed <= rank for needed in range(len(LEVELS[name]))
        ]


@pytest.mark.parametrize("name", LEVELS)
def test_what_is_not_said_is_the_weakest(name):
    assert getattr(Capabilities(), name) == LEVELS[name][0]
    assert Capabilities().missing(Capabilities()) == []


@pytest.mark.parametrize("name", SETS)
def test_a_set_covers_its_subsets(name):
    everything, (one, *others) = frozenset(SETS[name]), SETS[name]

    assert lacking(name, everything, everything) == []
    assert lacking(name, everything, {one}) == []
    assert lacking(name, everything, frozenset()) == []
    assert lacking(name, frozenset(others), {one}) != []
    assert lacking(name, {one}, everything) != []
    assert lacking(name, frozenset(), {one}) == [f"{name} ({{}}, needed is {{{one}}})"]


@pytest.mark.parametrize(("name", "needed"), TOLD.items())
def test_what_is_only_told_is_not_compared(name, needed):
    assert Capabilities().missing(Capabilities(**{name: needed})) == []


def test_all_that_is_lacking_is_named_with_what_there_is():
    promised = Capabilities(ordering="key", dead_letter=True, distribution=frozenset({"competing"}))
    needed = Capabilities(
        ordering="destination",
        dead_letter=True,
        distribution=frozenset({"competing", "broadcast"}),
        max_message_bytes=9,
        multi_process=True,
    )

    assert promised.missing(needed) == [
        "ordering (key, needed is destination)",
        "distribution ({competing}, needed is {broadcast, competing})",
        "max_message_bytes (0, needed is 9)",
        "multi_process (False, needed is True)",
    ]


def test_requiring_says_who_lacks_what_for_which_option_and_what_can_be_done():
    with pytest.raises(UnsupportedCapability) as caught:
        require("a broker", Capabilities(), Capabilities(dead_letter=True, replay="position"), for_="X(y)", remedy="go")

    assert str(caught.value) == (
        "str does not promise dead_letter (False, needed is True); replay (none, needed is position), "
        "which X(y) needs; go"
    )
    assert caught.value.lacks == ("dead_letter (False, needed is True)", "replay (none, needed is position)")
    assert isinstance(caught.value, ConfigurationError)


def test_requiring_what_is_promised_says_nothing():
    require("a broker", Capabilities(replay="position"), Capabilities(replay="earliest"), for_="X(y)", remedy="go")


def test_a_level_that_there_is_not_is_refused():
    with pytest.raises(
        ConfigurationError, match="guarantee must be one of at_most_once, at_least_once; got 'exactly_once'"
    ):
        Capabilities(guarantee="exactly_once")
