"""A message keeps the values that it was made with, and its `repr` shows no content."""

from dataclasses import FrozenInstanceError, replace
from uuid import UUID, uuid4

import pytest

from diator.brokers import Message
from diator.brokers.base import Topic
from diator.brokers.codec import decode_envelope, encode
from diator.brokers.memory import DeadLetter
from diator.exceptions import EncodingError


def test_a_message_can_be_made_without_an_event_class():
    message = Message.create(message_name="user.joined", payload={"name": "Jürgen", "tags": [1, None, True]})

    assert (message.message_type, message.message_name) == ("notification_event", "user.joined")
    assert isinstance(message.message_id, UUID)
    assert message.payload_json == '{"name":"Jürgen","tags":[1,null,true]}'.encode()
    assert (message.key, message.headers) == (None, {})


def test_every_field_can_be_set():
    message_id = uuid4()

    message = Message.create(
        message_type="audit", message_name="a", message_id=message_id, payload={}, key="7", headers={"trace": "x"}
    )

    assert (message.message_type, message.message_id) == ("audit", message_id)
    assert (message.key, message.headers) == ("7", {"trace": "x"})


def test_a_payload_that_replaces_another_one_is_encoded():
    message = Message.create(message_name="a", payload={"a": 1})

    assert replace(message, payload_json=b'{"b":2}').payload == {"b": 2}
    with pytest.raises(TypeError, match=r"replace\(\) needs payload_json"):
        replace(message, payload={"b": 2})


def test_the_constructor_takes_a_payload_and_makes_the_id():
    """As programs of diator 0.0.3 write it."""
    messages = [Message(message_type="", message_name="", payload={"phrase": "hello"}) for _ in range(2)]

    assert [message.payload for message in messages] == [{"phrase": "hello"}] * 2
    assert len({message.message_id for message in messages}) == 2
    assert all(isinstance(message.message_id, UUID) for message in messages)


@pytest.mark.parametrize("payload", [{}, {"payload": {}, "payload_json": b"{}"}], ids=["neither", "both"])
def test_a_message_has_one_payload(payload):
    with pytest.raises(TypeError, match="either payload or payload_json"):
        Message(message_type="a", message_name="b", message_id=uuid4(), **payload)


def test_a_copy_may_have_other_fields():
    message = Message.create(message_name="a", payload={"n": 1})

    changed = replace(message, headers={"trace": "x"})

    assert changed == Message.create(
        message_name="a", payload={"n": 1}, message_id=message.message_id, headers={"trace": "x"}
    )
    assert changed != message


def test_payload_returns_a_new_object_at_each_access():
    message = Message.create(message_name="a", payload={"tags": []})

    message.payload["tags"].append("changed")

    assert message.payload == {"tags": []}


def test_a_later_change_of_the_payload_does_not_change_the_message():
    payload = {"tags": []}
    message = Message.create(message_name="a", payload=payload)

    payload["tags"].append("changed")

    assert message.payload == {"tags": []}


def test_a_message_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Message.create(message_name="a", payload={}).message_name = "b"


def test_no_repr_contains_what_a_message_does():
    message = Message.create(
        message_name="a", payload={"password": "secret"}, key="secret", headers={"token": "secret"}
    )
    body = encode(message)
    letter = DeadLetter(topic=Topic("notification_event", "a"), body=body, attempts=1, reason="permanent")

    for described in (message, letter, decode_envelope(body, max_bytes=1_000, headers={})):
        assert "secret" not in repr(described)
        assert "notification_event" in repr(described)


cyclic: list = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, float("nan"), float("inf"), [[float("nan")]], "\ud800", b"bytes", complex(1), cyclic],
    ids=["object", "set", "NaN", "infinity", "NaN in lists", "lone surrogate", "bytes", "complex", "cyclic"],
)
def test_a_value_that_json_cannot_represent_is_refused(value):
    with pytest.raises(EncodingError) as caught:
        Message.create(message_name="user.joined", payload={"field": value})

    assert caught.value.path.startswith("user.joined.payload")


def test_keys_that_collide_as_text_are_refused():
    with pytest.raises(EncodingError):
        Message.create(message_name="a", payload={1: "number", "1": "text"})


def test_a_payload_that_is_not_an_object_is_refused():
    with pytest.raises(EncodingError):
        Message.create(message_name="a", payload=["a list"])
