"""Pure: how much longer a mixed load takes than its parts, from a rehearsal with requests of its own.

Steps and hand-offs are profiled in steady states: always the same batch, always the same neighbour. In a
load where they come and go they take longer (caches, clocks and threads that must wake up first). A
rehearsal shows by how much; what it measures serves forecasts of other loads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from planner.forecast.live_forecast import PairLimits, forecast
from planner.forecast.live_profile import LiveProfile
from planner.workloads.workload import SimRequest
from tandem.errors import InvalidRequest
from tandem.slo import SloClass

SLO_CLASS = "rehearsal"

ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A request of the rehearsal, and what its client saw; `tpot_s` counts from the second token on."""

    asked: SimRequest
    ttft_s: float
    tpot_s: float


def rehearsed(profile: LiveProfile, requests: Sequence[Rehearsed], limits: PairLimits) -> LiveProfile:
    """The profile whose forecast of the rehearsal is neither too short nor too long at the median request.

    Longer steps make longer queues, so that is approached in rounds. Raises InvalidRequest for a
    rehearsal without requests of two tokens or more.
    """
    for _ in range(ROUNDS):
        reading_s, writing_s = _late_s(profile, requests, limits)
        more_s = {
            "prefill_unrest_s": max(0.0, profile.prefill_unrest_s + reading_s),
            "decode_unrest_s": max(0.0, profile.decode_unrest_s + writing_s),
        }
        profile = profile.model_copy(update=more_s)
    return profile


def _late_s(profile: LiveProfile, requests: Sequence[Rehearsed], limits: PairLimits) -> tuple[float, float]:
    """By how much TTFT and TPOT were longer than forecast, at the median request."""
    never = SloClass(SLO_CLASS, math.inf, math.inf, math.inf)
    found = forecast(profile, [one.asked for one in requests], never, limits)
    if not found.tpot_s:
        raise InvalidRequest("A rehearsal needs requests of two tokens or more.", "rehearsal")
    seen = {one.asked.number: one for one in requests}
    reading = [seen[number].ttft_s - ttft_s for number, ttft_s in found.ttft_s.items()]
    writing = [seen[number].tpot_s - tpot_s for number, tpot_s in found.tpot_s.items()]
    return median(reading), median(writing)
