"""Edge: work of others on the machine is told from work of one's own."""

import pytest

from benchmarks.machine_use import CpuTimes, cpu_times, others_share


def test_what_nobody_of_ours_did_is_others() -> None:
    before = CpuTimes(100.0, 50.0, 20.0)
    after = CpuTimes(110.0, 62.0, 27.0)
    assert others_share(before, after, cores=2) == pytest.approx((12.0 - 7.0) / 20.0)


def test_rounding_makes_no_negative_share() -> None:
    assert others_share(CpuTimes(0.0, 0.0, 0.0), CpuTimes(1.0, 0.5, 0.6), cores=2) == 0.0


def test_own_work_is_counted_as_own() -> None:
    before = cpu_times()
    spent = before
    while spent.own_s - before.own_s < 0.2:
        sum(range(100_000))
        spent = cpu_times()
    assert spent.at_s > before.at_s
    assert spent.busy_s - before.busy_s > 0
