"""The names of channels and keys in Redis. Nothing here connects."""

import fnmatch
import re

import pytest

pytest.importorskip("redis")

from hypothesis import example, given
from hypothesis import strategies as st

from diator.brokers.base import Topic
from diator.brokers.redis import RedisMessageBroker
from diator.brokers.redis._names import DEAD, channel, channels_of, of_group, stream
from diator.brokers.redis_streams import RedisStreamMessageBroker
from diator.exceptions import ConfigurationError

ODD = st.text(":*?[]^\\{}%a-", max_size=5)
PARTS = st.lists(st.sampled_from([":", "%", "%3A", "%25", "/"]), max_size=2).map("".join)
WORDS = st.lists(st.sampled_from(["", "a", "A", "a/a", "%3A", "again", "delayed", "dead"]), min_size=5, max_size=7)


@st.composite
def divided(draw, words, count):
    """Return the *words* as so many parts: what one place has as one part may be several parts of another."""
    ends = sorted(draw(st.sets(st.integers(1, len(words) - 1), min_size=count - 1, max_size=count - 1)))
    return [":".join(words[start:end]) for start, end in zip([0, *ends], [*ends, len(words)], strict=True)]


@st.composite
def keys(draw, words):
    """Return a place and its key: a stream, or what a group has for it."""
    if words[-1] in ("again", "delayed", "dead") and draw(st.booleans()):
        prefix, kind, name, group = draw(divided(words[:-1], 4))
        own = group, words[-1].encode()
        return (prefix, kind, name, own), of_group(stream(prefix, Topic(kind, name)), *own)
    prefix, kind, name = draw(divided(words, 3))
    return (prefix, kind, name), stream(prefix, Topic(kind, name))


@given(st.data(), WORDS)
def test_two_keys_are_one_only_if_all_their_parts_are(data, words):
    (one, one_key), (other, other_key) = data.draw(keys(words)), data.draw(keys(words))

    assert (one_key == other_key) is (one == other)


@given(st.data(), WORDS)
def test_two_channels_are_one_only_if_all_their_parts_are(data, words):
    one, other = data.draw(divided(words, 3)), data.draw(divided(words, 3))

    assert (channel(one[0], Topic(*one[1:])) == channel(other[0], Topic(*other[1:]))) is (one == other)


@example(":", "%3A", "a", "a")
@example(":a", "%3Aa", "a:", "a")
@given(PARTS, PARTS, PARTS, PARTS)
def test_escaping_makes_no_two_parts_one(one, other, kind, name):
    for make in (stream, channel):
        assert (make(one, Topic(kind, name)) == make(other, Topic(kind, name))) is (one == other)
        assert (make("p", Topic(one, name)) == make("p", Topic(other, name))) is (one == other)
        assert (make("p", Topic(kind, one)) == make("p", Topic(kind, other))) is (one == other)
    assert (of_group(b"s", one, DEAD) == of_group(b"s", other, DEAD)) is (one == other)


@given(st.text(), st.text().filter(lambda part: ":" not in part), st.text().filter(lambda part: ":" not in part))
def test_a_topic_without_a_colon_has_the_channel_it_always_had(prefix, kind, name):
    assert channel(prefix, Topic(kind, name)) == f"{prefix}:{kind}:{name}".encode()


def test_ordinary_keys_are_readable():
    own = of_group(stream("shop", Topic("notification_event", "OrderPaid")), "billing", DEAD)

    assert own == b"shop:notification_event:OrderPaid:billing:dead"
    assert stream("eu:shop", Topic("a", "50%")) == b"eu%3Ashop:a:50%25"
    assert channel("eu:shop", Topic("a:b", "c/d")) == b"eu%3Ashop/a%3Ab/c%2Fd"


@given(ODD, ODD)
def test_the_pattern_for_older_senders_matches_literally(prefix, kind):
    pattern, start = channels_of(prefix, kind)

    assert start == f"{prefix}:{kind}:".encode()
    # Redis's escape, as Python's fnmatch writes it
    translated = re.sub(rb"\\(.)", lambda found: b"[" + found[1] + b"]", pattern, flags=re.DOTALL)
    assert fnmatch.fnmatchcase(start + b"an-id", translated) or b"\\" in start  # `[\]` escapes nothing in fnmatch


@pytest.mark.parametrize("broker", [RedisMessageBroker, RedisStreamMessageBroker])
def test_a_prefix_that_is_invalid_unicode_is_refused(broker):
    with pytest.raises(ConfigurationError, match="lone surrogate"):
        broker("redis://localhost", "\ud800")


@pytest.mark.parametrize(
    ("broker", "topic", "group"),
    [
        (RedisMessageBroker, Topic("a", "\ud800"), None),
        (RedisStreamMessageBroker, Topic("\ud800", "b"), "g"),
        (RedisStreamMessageBroker, Topic("a", "b"), "\ud800"),
    ],
)
async def test_a_topic_or_a_group_that_is_invalid_unicode_is_refused(broker, topic, group):
    with pytest.raises(ConfigurationError, match="lone surrogate"):
        async with broker("redis://localhost:1").subscribe([topic], group=group):
            pass
