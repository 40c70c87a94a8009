"""Stage times, and which stage an SLO miss is blamed on."""

import pytest

from router.slo_accounting import SloAccounting
from router.timeline import SampleTimes, Timeline
from tandem.slo import SloClass, Stage

SLO = SloClass("chat", ttft_s=1.0, tpot_s=0.1, longest_gap_s=0.5)


def timeline(
    queue_s: float = 0.1,
    prefill_s: float = 0.2,
    handoff_s: float = 0.05,
    gaps_s: tuple[float, ...] = (0.05, 0.05, 0.05),
) -> Timeline:
    """A request that arrived at 10; the hand-off landed `handoff_s` after token 0."""
    times = Timeline(10.0, [SampleTimes()])
    times.prefill_sent("p", 10.0 + queue_s)
    first_s = 10.0 + queue_s + prefill_s
    times.emitted(0, 1, first_s)
    times.landed("d", "shm", 100, first_s + handoff_s)
    now_s = first_s
    for gap_s in gaps_s:
        now_s += gap_s
        times.emitted(0, 1, now_s)
    return times


def test_report_names_the_times_of_all_stages() -> None:
    report = timeline(gaps_s=(0.05, 0.1)).report(SLO, 99.0)
    assert report.queue_s == pytest.approx(0.1)
    assert report.prefill_s == pytest.approx(0.2)
    assert report.handoff_s == pytest.approx(0.05)
    assert report.decode_s == pytest.approx(0.1)
    assert report.ttft_s == pytest.approx(0.3)
    assert report.tpot_s == pytest.approx(0.075)
    assert report.longest_gap_s == pytest.approx(0.1)
    assert report.slo_met
    assert (report.prefill_worker, report.decode_worker, report.transport) == ("p", "d", "shm")


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        ({"queue_s": 0.9, "prefill_s": 0.3}, Stage.QUEUE),
        ({"queue_s": 0.3, "prefill_s": 0.9}, Stage.PREFILL),
        ({"handoff_s": 0.55, "gaps_s": (0.6, 0.01, 0.01)}, Stage.HANDOFF),
        ({"gaps_s": (0.05, 0.6, 0.01)}, Stage.DECODE),
        ({"gaps_s": (0.2, 0.2, 0.2)}, Stage.DECODE),
        ({"handoff_s": 0.3, "gaps_s": (0.3, 0.05, 0.05)}, Stage.HANDOFF),
        ({}, None),
    ],
)
def test_miss_is_blamed_on_the_stage_that_caused_it(how: dict[str, object], stage: Stage | None) -> None:
    assert timeline(**how).missed_by(SLO, 99.0) is stage  # type: ignore[arg-type]


def test_request_without_a_first_token_missed_by_where_it_waits() -> None:
    waiting = Timeline(10.0, [SampleTimes()])
    assert waiting.missed_by(SLO, 12.0) is Stage.QUEUE
    waiting.prefill_sent("p", 10.1)
    assert waiting.missed_by(SLO, 12.0) is Stage.PREFILL


def test_tokens_that_come_together_have_one_gap() -> None:
    sample = SampleTimes()
    assert sample.emitted(1, 1.0) is None
    assert sample.emitted(4, 1.4) == pytest.approx(0.4)
    assert sample.tpot_s == pytest.approx(0.1)


def test_goodput_counts_the_last_minute_and_every_request_offered() -> None:
    accounting = SloAccounting([SLO], started_s=0.0)
    for second in range(120):
        accounting.offered("chat")
        accounting.offered("chat")
        accounting.good("chat", float(second))
    (figure,) = accounting.figures(119.5)
    assert (figure.offered, figure.good) == (240, 120)
    assert figure.goodput_rps == pytest.approx(1.0, rel=0.04)
    (later,) = accounting.figures(500.0)
    assert later.goodput_rps == 0.0


def test_young_router_divides_by_its_age() -> None:
    accounting = SloAccounting([SLO], started_s=100.0)
    for _ in range(10):
        accounting.good("chat", 104.0)
    assert accounting.figures(105.0)[0].goodput_rps == pytest.approx(2.0)
