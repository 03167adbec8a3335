"""The arithmetic of the benchmarks. The measurements take services and time and do not run here."""

import pytest

from benchmarks import brokers, outbox, skew, telemetry


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
    """Every workload that is measured beside other libraries has a target."""
    assert transport.targets.keys() == (set() if transport.is_inside else {*brokers.PUBLISHING, *brokers.DRAINING})


@pytest.mark.parametrize(
    ("wait_ms", "per_second", "met"),
    [(2.0, 80.0, (True, True)), (2.1, 100.0, (False, True)), (1.0, 79.0, (True, False))],
)
def test_a_slow_key_is_judged_by_the_wait_and_the_rate_of_the_others(wait_ms, per_second, met):
    """Both are compared within one round."""
    without = [{"wait_ms": 1.0, "per_second": 100.0, "faults": []}]

    figures = skew.figures(without, [{"wait_ms": wait_ms, "per_second": per_second, "faults": ["a fault"]}])

    assert (figures["wait"]["met"], figures["rate"]["met"]) == met
    assert figures["faults"] == ["a fault"]


@pytest.mark.parametrize(("extra", "met"), [(30, True), (200, False)])
def test_telemetry_is_judged_by_what_it_adds(extra, met):
    ours = {"plain": [100, 200, 90], "traced": [100 + extra, 201 + extra, 90]}
    theirs = {"plain": [400, 400, 400], "traced": [500, 500, 900]}
    found = {"diator": telemetry.figures(ours), "faststream": telemetry.figures(theirs)}
    telemetry.judge(found)

    diator = found["diator"]
    assert (diator["extra"]["microseconds"], diator["ratio"]["ratio"]) == (extra, extra / 100)
    assert (diator["extra"]["met"], diator["ratio"]["met"]) == (met, met)


@pytest.mark.parametrize(("last", "met"), [(42.0, True), (42.5, False)])
def test_memory_is_judged_by_its_growth_after_the_first_quarter(last, met):
    figures = telemetry.grown([40.0, 47.0, 43.0, last])

    assert (figures["growth_mib"], figures["met"]) == (last - 40.0, met)


@pytest.mark.parametrize(("rate", "met"), [(6_000, True), (2_999, False)])
def test_a_relay_is_judged_by_its_rate_and_by_the_fastest_other(rate, met):
    """What a program writes by hand is not another library."""
    relays = {"diator": rate, "by hand": 9_000, "one": 1_000, "another": 2_000}
    found = {name: {str(keys): {"rate": each} for keys in outbox.RATES} for name, each in relays.items()}

    outbox.judge(found)

    keyed = found["diator"]["100"]
    assert (keyed["met"], keyed["ratio"]["ratio"], keyed["ratio"]["met"]) == (met, rate / 2_000, met)
    assert found["diator"]["0"]["met"] is met


@pytest.mark.parametrize(("ours", "met"), [(0.005, True), (0.006, False)])
def test_storing_is_judged_by_the_medians_of_the_rounds(ours, met):
    seconds = {"by hand": [0.004, 0.004, 0.9], "diator": [ours, ours, 0.001]}

    stored = outbox._store(lambda library, *_, **__: {"seconds": seconds[library]}, 1)

    assert (stored["ratio"], stored["met"]) == (pytest.approx(ours / 0.004), met)
