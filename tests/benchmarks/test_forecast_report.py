"""Pure: a forecast beside what was measured: its errors, its bars, its page."""

from typing import Any

import pytest

from benchmarks.forecast_report import Compared, Figures, forecast_json, forecast_page, forecast_text
from benchmarks.latency_summary import Spread

CONDITIONS: dict[str, Any] = {
    "date": "2026-11-21T12:00:00+00:00",
    "machine": "a machine, 2 cores",
    "load_average_before": 0.5,
    "trace": "azure.csv",
    "length_scale": 0.05,
    "requests": 300,
    "slo_s": [0.5, 0.1, 1.0],
}


def figures(scale: float, attainment: float) -> Figures:
    return Figures(
        Spread(scale * 0.1, scale * 0.1, scale * 0.2, None),
        Spread(scale * 0.01, scale * 0.01, scale * 0.02, None),
        attainment,
    )


def result(scale: float, attainment: float) -> dict[str, Any]:
    compared = Compared(2.0, 0.5, 0.9, figures(scale, attainment), figures(1.0, 0.9), 0.02)
    return forecast_json(CONDITIONS, [compared], {})


@pytest.mark.parametrize(
    ("scale", "attainment", "within"),
    [(1.14, 0.9, True), (1.16, 0.9, False), (0.84, 0.9, False), (1.0, 0.96, False), (1.0, 0.86, True)],
)
def test_bars_hold_both_ways(scale: float, attainment: float, within: bool) -> None:
    assert result(scale, attainment)["within_bars"] is within


def test_errors_are_shares_of_what_was_measured() -> None:
    run = result(1.1, 0.85)["runs"][0]
    assert run["ttft_p90"]["error"] == pytest.approx(0.1)
    assert run["attainment"]["difference"] == pytest.approx(-0.05)


def test_a_run_without_tokens_is_not_within_the_bars() -> None:
    nothing = Spread(None, None, None, None)
    compared = Compared(2.0, 0.5, 0.9, figures(1.0, 0.9), Figures(nothing, nothing, 0.0), 0.0)
    found = forecast_json(CONDITIONS, [compared], {})
    assert found["within_bars"] is False
    assert "| - |" in forecast_text(found)


def test_the_page_says_how_it_was_measured() -> None:
    page = forecast_page(result(1.3, 0.9))
    shown = ("load average 0.50", "azure.csv", "TTFT 0.5 s", "+30.0%", "| 2.0% |", "Not all figures")
    for said in shown:
        assert said in page
