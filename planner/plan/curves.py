"""Pure: the points of a plan's plot: attainment of the best candidate of each mode by rate and by SLO
scale."""

from collections.abc import Callable, Iterable, Sequence

from planner.placements.placement import Candidate, Mode, Reached
from planner.plan.plot import Line
from planner.plan.result import PlanResult

RATE_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
SLO_SCALES = (2.0, 1.5, 1.25, 1.0, 0.8, 0.6, 0.4)


def plan_lines(
    result: PlanResult,
    attainments: Callable[[Sequence[tuple[Candidate, float, int, float]]], Iterable[Reached]],
) -> list[Line]:
    """Rates are shares of the best candidate's goodput a device; SLO scales are tried at 0.9 of its own
    goodput."""
    best = [one for mode in Mode if (one := result.best(mode)) is not None]
    most = max(one.per_device_rps for one in best)
    lines = []
    for one in best:
        rates = [share * most * one.devices for share in RATE_SHARES]
        runs = [(one.candidate, rate, 0, 1.0) for rate in rates]
        runs += [(one.candidate, 0.9 * one.rate_rps, 0, scale) for scale in SLO_SCALES]
        shares = [reached.share for reached in attainments(runs)]
        by_rate = [(rate / one.devices, share) for rate, share in zip(rates, shares, strict=False)]
        by_scale = list(zip(SLO_SCALES, shares[len(rates) :], strict=True))
        lines.append(Line(str(one.candidate), by_rate, by_scale))
    return lines
