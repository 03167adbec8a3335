"""The arithmetic of the benchmarks. The measurements take services and time and do not run here."""

import pytest

from benchmarks import brokers


def test_a_ratio_is_the_median_of_the_ratios_within_one_round():
    """The machine was twice as fast in the second round: no ratio mixes two rounds."""
    ours, theirs = [10.0, 40.0, 15.0], [10.0, 20.0, 10.0]

    figures = brokers._ratio(ours, theirs, 1.5, lower=False)

    assert figures["ratios"] == [1.0, 2.0, 1.5]
    assert figures["ratio"] == 1.5
    assert figures["met"] is True


@pytest.mark.parametrize(("ratio", "met"), [(1.0, True), (1.2, False)])
def test_for_a_latency_less_is_better(ratio, met):
    """A latency meets its target from below."""
    figures = brokers._ratio([ratio], [1.0], 1.1, lower=True)

    assert figures["met"] is met


@pytest.mark.parametrize("transport", brokers.TRANSPORTS.values(), ids=brokers.TRANSPORTS)
def test_every_rate_has_a_target(transport):
    """Every workload that is measured has a target."""
    assert transport.targets.keys() == {*brokers.PUBLISHING, *brokers.DRAINING}
