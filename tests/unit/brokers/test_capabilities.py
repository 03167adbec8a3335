"""The promises of a transport are compared with the needs of a program: every field, in both directions."""

from dataclasses import FrozenInstanceError, fields

import pytest

from diator.brokers.capabilities import Capabilities, require
from diator.exceptions import ConfigurationError, UnsupportedCapability

#: The weakest level first.
LEVELS = {
    "guarantee": ["at_most_once", "at_least_once"],
    "receipt": ["none", "accepted", "durable"],
    "settlement": ["none", "cumulative", "individual"],
    "delayed_retry": [False, True],
    "dead_letter": [False, True],
    "delivery_count": ["none", "retries", "deliveries", "exact"],
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
SETS = {"redelivery": ["close", "crash", "deadline", "retry"], "distribution": ["broadcast", "competing"]}
INFORMATION = {"redelivery_bound": 1.5, "network": True}


def missing(name, has, needs):
    return Capabilities(**{name: has}).missing(Capabilities(**{name: needs}))


def test_these_tests_cover_every_field():
    assert {field.name for field in fields(Capabilities)} == {*LEVELS, *SETS, *INFORMATION}


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_covers_itself_and_the_weaker_ones(name):
    for rank, has in enumerate(LEVELS[name]):
        assert [missing(name, has, needs) == [] for needs in LEVELS[name]] == [
            needed <= rank for needed in range(len(LEVELS[name]))
        ]


@pytest.mark.parametrize("name", LEVELS)
def test_the_default_is_the_weakest_level(name):
    assert getattr(Capabilities(), name) == LEVELS[name][0]
    assert Capabilities().missing(Capabilities()) == []


def test_by_default_there_is_no_link_and_no_bound():
    assert (Capabilities().network, Capabilities().redelivery_bound) == (False, None)
    assert (Capabilities().redelivery, Capabilities().distribution) == (frozenset(), frozenset())


@pytest.mark.parametrize("name", SETS)
def test_a_set_covers_its_subsets(name):
    everything, (one, *others) = frozenset(SETS[name]), SETS[name]

    assert missing(name, everything, everything) == []
    assert missing(name, everything, {one}) == []
    assert missing(name, everything, frozenset()) == []
    assert missing(name, frozenset(others), {one}) != []
    assert missing(name, {one}, everything) != []
    assert missing(name, frozenset(), {one}) == [f"{name} ({{}}, needed is {{{one}}})"]


@pytest.mark.parametrize(("name", "needed"), INFORMATION.items())
def test_fields_for_information_are_not_compared(name, needed):
    assert Capabilities().missing(Capabilities(**{name: needed})) == []


def test_each_missing_capability_is_listed_with_what_is_promised_and_needed():
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


def test_the_error_names_broker_missing_capability_option_and_remedy():
    with pytest.raises(UnsupportedCapability) as caught:
        require("a broker", Capabilities(), Capabilities(dead_letter=True, replay="position"), for_="X(y)", remedy="go")

    assert str(caught.value) == (
        "str does not promise dead_letter (False, needed is True); replay (none, needed is position), "
        "which X(y) needs; go"
    )
    assert caught.value.lacks == ("dead_letter (False, needed is True)", "replay (none, needed is position)")
    assert isinstance(caught.value, ConfigurationError)


def test_requiring_a_promised_capability_raises_nothing():
    require("a broker", Capabilities(replay="position"), Capabilities(replay="earliest"), for_="X(y)", remedy="go")


def test_an_unknown_level_is_refused():
    with pytest.raises(
        ConfigurationError, match="guarantee must be one of at_most_once, at_least_once; got 'exactly_once'"
    ):
        Capabilities(guarantee="exactly_once")


@pytest.mark.parametrize("name", [name for name, levels in LEVELS.items() if isinstance(levels[0], str)])
def test_every_field_with_levels_refuses_an_unknown_one(name):
    with pytest.raises(ConfigurationError, match=f"{name} must be one of {', '.join(LEVELS[name])}; got 'other'"):
        Capabilities(**{name: "other"})


def test_a_promise_does_not_change_and_is_made_by_name():
    with pytest.raises(FrozenInstanceError):
        Capabilities().dead_letter = True
    with pytest.raises(TypeError):
        Capabilities("at_least_once")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("found", [{"closd"}, frozenset({"close", "broadcast"}), "close", ["close"], None])
def test_an_unknown_word_in_a_set_is_refused(name, found):
    with pytest.raises(ConfigurationError, match=f"{name} must be a set of {', '.join(SETS[name])}; got "):
        Capabilities(**{name: found})


CONTRADICTIONS = [
    ({"guarantee": "at_least_once"}, ["needs a settlement", "needs a receipt"]),
    ({"redelivery": {"close"}}, ["needs a settlement"]),
    ({"settlement": "individual", "redelivery": {"crash"}}, ["needs a redelivery_bound"]),
    ({"settlement": "individual", "redelivery": {"deadline"}}, ["needs a redelivery_bound"]),
    ({"settlement": "individual", "redelivery": {"close"}, "delayed_retry": True}, ["delayed_retry needs"]),
    ({"settlement": "individual", "redelivery": {"retry"}, "ordered_retry": True}, ["ordered_retry needs"]),
    ({"ordering": "key", "ordered_retry": True}, ["ordered_retry needs"]),
    ({"delivery_count": "retries"}, ["delivery_count needs"]),
    ({"subscription": "durable"}, ["a durable subscription needs"]),
    ({"receipt": "durable"}, ["a durable receipt needs"]),
    ({"multi_process": True}, ["multi_process needs"]),
    ({"distribution": frozenset()}, ["needs a distribution"]),
    ({"max_message_bytes": 0}, ["needs max_message_bytes"]),
]


@pytest.mark.parametrize(("promised", "rules"), CONTRADICTIONS)
def test_a_promise_that_needs_another_one_contradicts_without_it(promised, rules):
    kept = {"distribution": frozenset({"broadcast"}), "max_message_bytes": 1}

    assert Capabilities(**kept).contradictions() == []
    found = Capabilities(**{**kept, **promised}).contradictions()
    assert len(found) == len(rules)
    assert all(rule in each for rule, each in zip(rules, found, strict=True))


EVERYTHING = {
    **{name: levels[-1] for name, levels in LEVELS.items()},
    **{name: frozenset(words) for name, words in SETS.items()},
    **INFORMATION,
}


@pytest.mark.parametrize(
    ("without", "rules"),
    [
        ({"settlement": "none"}, ["guarantee at_least_once needs a settlement", "redelivery needs a settlement"]),
        ({"receipt": "none"}, ["guarantee at_least_once needs a receipt"]),
        ({"redelivery_bound": None}, ["redelivery after a crash or a deadline needs a redelivery_bound"]),
        (
            {"redelivery": {"close", "crash", "deadline"}},
            [
                "delayed_retry needs the redelivery retry",
                "ordered_retry needs the redelivery retry and an ordering",
            ],
        ),
        (
            {"redelivery": set(), "delayed_retry": False, "ordered_retry": False},
            ["delivery_count needs a redelivery"],
        ),
        ({"ordering": "none"}, ["ordered_retry needs the redelivery retry and an ordering"]),
        ({"distribution": {"broadcast"}}, ["a durable subscription needs the distribution competing"]),
        ({"distribution": set(), "subscription": "ephemeral"}, ["a transport needs a distribution"]),
        ({"durability": "none"}, ["a durable receipt needs a durability"]),
        ({"network": False}, ["multi_process needs a network"]),
        ({"max_message_bytes": 0}, ["a transport needs max_message_bytes above 0"]),
    ],
)
def test_who_promises_everything_needs_everything(without, rules):
    assert Capabilities(**EVERYTHING).contradictions() == []
    assert Capabilities(**{**EVERYTHING, **without}).contradictions() == rules
