"""Findings about the settings of a Kafka broker. `tests/integration/kafka/test_topics.py` has those about topics."""

import pytest

pytest.importorskip("aiokafka")

from diator.brokers.kafka._audit import _broker_findings, _limit_findings


def weakened(**settings) -> list[str]:
    named = {name.replace("_", "."): value for name, value in settings.items()}
    return [each.capability for each in _broker_findings({"1": named})]


def test_of_the_default_settings_only_the_creation_of_topics_is_a_finding():
    defaults = {"offsets_retention_minutes": "10080", "offset_metadata_max_bytes": "4096"}
    assert weakened(**defaults, auto_create_topics_enable="false") == []
    assert weakened(**defaults, auto_create_topics_enable="true") == ["durability"]


@pytest.mark.parametrize(
    ("setting", "promise"),
    [("offsets_retention_minutes", "subscription"), ("offset_metadata_max_bytes", "delivery_count")],
)
def test_a_setting_that_is_too_low_is_a_finding(setting, promise):
    assert weakened(**{setting: "100"}) == [promise]


def test_hidden_settings_are_a_finding():
    (finding,) = _broker_findings({"1": "ClusterAuthorizationFailedError"})
    assert "may not read the settings of broker 1 (ClusterAuthorizationFailedError)" in finding.problem


@pytest.mark.parametrize(
    ("own", "source", "count"), [("1000", "2000", 1), ("2000", "2000", 0), ("3000", "2000", 0), ("1000", None, 0)]
)
@pytest.mark.parametrize("beside", ["p.t.N.g-dlq", "p.t.N.g-retry", "p.t.N-dlq"])
def test_a_topic_of_a_group_that_accepts_less_than_its_source_is_a_finding(own, source, count, beside):
    settings = {beside: {"max.message.bytes": own}, "p.t.N": "TopicAuthorizationFailedError"}
    if source is not None:
        settings["p.t.N"] = {"max.message.bytes": source}

    found = [*_limit_findings(beside, settings)]

    assert [each.capability for each in found] == ["dead_letter"] * count
    assert [*_limit_findings("p.t.N", settings)] == []
    assert all("max.message.bytes is 1,000, and 2,000 for the topic beside it" in each.problem for each in found)
