"""What travels: a message keeps what it was made of, and shows none of it in logs."""

from dataclasses import FrozenInstanceError
from uuid import UUID, uuid4

import pytest

from diator.brokers import Message
from diator.exceptions import EncodingError


def test_is_made_without_an_event_class():
    message = Message.create(message_name="user.joined", payload={"name": "Jürgen", "tags": [1, None, True]})

    assert (message.message_type, message.message_name) == ("notification_event", "user.joined")
    assert isinstance(message.message_id, UUID)
    assert message.payload_json == '{"name":"Jürgen","tags":[1,null,true]}'.encode()
    assert (message.key, message.headers) == (None, {})


def test_is_made_of_what_it_is_given():
    message_id = uuid4()

    message = Message.create(
        message_type="audit", message_name="a", message_id=message_id, payload={}, key="7", headers={"trace": "x"}
    )

    assert (message.message_type, message.message_id) == ("audit", message_id)
    assert (message.key, message.headers) == ("7", {"trace": "x"})


def test_gives_its_payload_anew_each_time():
    message = Message.create(message_name="a", payload={"tags": []})

    message.payload["tags"].append("changed")

    assert message.payload == {"tags": []}


def test_a_change_of_what_it_was_made_of_does_not_reach_it():
    payload = {"tags": []}
    message = Message.create(message_name="a", payload=payload)

    payload["tags"].append("changed")

    assert message.payload == {"tags": []}


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Message.create(message_name="a", payload={}).message_name = "b"


def test_its_payload_is_no_part_of_its_repr():
    assert "secret" not in repr(Message.create(message_name="a", payload={"password": "secret"}))


cyclic: list = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, float("nan"), float("inf"), [[float("nan")]], "\ud800", b"bytes", complex(1), cyclic],
    ids=["object", "set", "NaN", "infinity", "NaN in lists", "lone surrogate", "bytes", "complex", "cyclic"],
)
def test_refuses_what_json_cannot_hold(value):
    with pytest.raises(EncodingError) as caught:
        Message.create(message_name="user.joined", payload={"field": value})

    assert caught.value.path.startswith("user.joined.payload")


def test_refuses_keys_of_which_one_would_be_lost():
    with pytest.raises(EncodingError):
        Message.create(message_name="a", payload={1: "number", "1": "text"})


def test_refuses_a_payload_that_is_no_object():
    with pytest.raises(EncodingError):
        Message.create(message_name="a", payload=["a list"])
