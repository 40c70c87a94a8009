"""Pure: what a forecast says beside what was measured: JSON, text and the page in docs/measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.latency_summary import Spread

LATENCY_BAR = 0.15
ATTAINMENT_BAR = 0.05
"""How far a forecast may lie from what is measured (issue 5)."""

_QUANTILES = (("ttft", "p50"), ("ttft", "p90"), ("tpot", "p50"), ("tpot", "p90"))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load, simulated or measured; seconds, and a share of the requests offered."""

    ttft_s: Spread
    tpot_s: Spread
    attainment: float

    def quantile_s(self, name: str, quantile: str) -> float | None:
        """`ttft` or `tpot`, `p50` or `p90`."""
        values = self.ttft_s if name == "ttft" else self.tpot_s
        return values.p50 if quantile == "p50" else values.p90


@dataclass(frozen=True, slots=True)
class Compared:
    """One rate; the busy shares are the simulation's. `others_cpu` is the share of the machine that other
    processes used while it was measured: what they take, the cluster lacks.
    """

    rate_rps: float
    prefill_busy: float
    decode_busy: float
    simulated: Figures
    measured: Figures
    others_cpu: float


def forecast_json(
    conditions: dict[str, Any], compared: Sequence[Compared], profile: dict[str, Any]
) -> dict[str, Any]:
    """All that a run found; errors are (simulated - measured) / measured, None without a measured value."""
    runs = [_run_json(one) for one in compared]
    return {
        "benchmark": "forecast",
        **conditions,
        "latency_bar": LATENCY_BAR,
        "attainment_bar": ATTAINMENT_BAR,
        "runs": runs,
        "within_bars": all(_within(run) for run in runs),
        "profile": profile,
    }


def compared_text(one: Compared) -> str:
    """One rate alone, as soon as it is known."""
    return "\n".join(_rows(_run_json(one)))


def forecast_text(result: dict[str, Any]) -> str:
    """The same for people."""
    return "\n".join([*_table(result), _verdict(result)])


def forecast_page(result: dict[str, Any]) -> str:
    """The page of docs/measurements."""
    ttft_s, tpot_s, gap_s = result["slo_s"]
    lines = [
        "# A forecast and what came of it",
        "",
        f"{result['date']}, {result['machine']}, load average {result['load_average_before']:.2f} before the "
        "start (the cluster was not running yet).",
        "",
        "`tandem bench sim --live`: SmolLM2-135M float32, one prefill and one decode worker of one thread.",
        "The profile is taken through the front door with requests of its own: alone, beside the other",
        "worker at work, and in a rehearsal.",
        f"Then the first {result['requests']} requests of {result['trace']} are simulated and offered,",
        f"with lengths times {result['length_scale']:g}. Nothing is fitted to a run that is forecast.",
        f"Objectives: TTFT {ttft_s:g} s, TPOT {tpot_s:g} s, gap {gap_s:g} s.",
        "",
        *_table(result),
        "",
        _verdict(result),
        "",
    ]
    return "\n".join(lines)


def _run_json(one: Compared) -> dict[str, Any]:
    run: dict[str, Any] = {
        "rate_rps": one.rate_rps,
        "prefill_busy": one.prefill_busy,
        "decode_busy": one.decode_busy,
        "others_cpu": one.others_cpu,
    }
    for name, quantile in _QUANTILES:
        simulated, measured = (
            figures.quantile_s(name, quantile) for figures in (one.simulated, one.measured)
        )
        run[f"{name}_{quantile}"] = {
            "simulated_s": simulated,
            "measured_s": measured,
            "error": None if simulated is None or not measured else (simulated - measured) / measured,
        }
    run["attainment"] = {
        "simulated": one.simulated.attainment,
        "measured": one.measured.attainment,
        "difference": one.simulated.attainment - one.measured.attainment,
    }
    return run


def _within(run: dict[str, Any]) -> bool:
    errors = [run[f"{name}_{quantile}"]["error"] for name, quantile in _QUANTILES]
    near = all(error is not None and abs(error) <= LATENCY_BAR for error in errors)
    return near and abs(run["attainment"]["difference"]) <= ATTAINMENT_BAR


def _table(result: dict[str, Any]) -> list[str]:
    lines = ["| req/s | figure | simulated | measured | error |", "|---|---|---|---|---|"]
    return lines + [row for run in result["runs"] for row in _rows(run)]


def _rows(run: dict[str, Any]) -> list[str]:
    lines = []
    for name, quantile in _QUANTILES:
        one = run[f"{name}_{quantile}"]
        lines.append(
            f"| {run['rate_rps']:g} | {name.upper()} {quantile} | {_ms(one['simulated_s'])} | "
            f"{_ms(one['measured_s'])} | {_percent(one['error'])} |"
        )
    good = run["attainment"]
    lines.append(
        f"| {run['rate_rps']:g} | attainment | {good['simulated']:.1%} | {good['measured']:.1%} | "
        f"{good['difference'] * 100:+.1f} points |"
    )
    lines.append(f"| {run['rate_rps']:g} | others' share of the cores | | {run['others_cpu']:.1%} | |")
    return lines


def _verdict(result: dict[str, Any]) -> str:
    within = "All" if result["within_bars"] else "Not all"
    return f"{within} figures are within {LATENCY_BAR:.0%} and {ATTAINMENT_BAR * 100:.0f} points."


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"
