"""What the settings of a broker weaken; a topic's settings are changed in tests/integration/kafka/test_topics.py."""

import pytest

pytest.importorskip("aiokafka")

from diator.brokers.kafka._audit import _of_a_broker


def weakened(**settings) -> list[str]:
    named = {name.replace("_", "."): value for name, value in settings.items()}
    return [each.capability for each in _of_a_broker({"1": named})]


def test_a_broker_as_kafka_comes_weakens_nothing_but_by_creating_topics():
    defaults = {"offsets_retention_minutes": "10080", "offset_metadata_max_bytes": "4096"}
    assert weakened(**defaults, auto_create_topics_enable="false") == []
    assert weakened(**defaults, auto_create_topics_enable="true") == ["durability"]


@pytest.mark.parametrize(
    ("setting", "promise"),
    [("offsets_retention_minutes", "subscription"), ("offset_metadata_max_bytes", "delivery_count")],
)
def test_what_is_set_too_low_is_told(setting, promise):
    assert weakened(**{setting: "100"}) == [promise]


def test_what_may_not_be_looked_at_is_told():
    (finding,) = _of_a_broker({"1": "ClusterAuthorizationFailedError"})
    assert "may not be looked at (ClusterAuthorizationFailedError)" in finding.problem
