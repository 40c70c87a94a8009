"""Pure: what a plan says: how many of which candidate, the ranking, and what holds each back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.placements.bound import Bounds
from planner.placements.goodput import Goodput
from planner.placements.mix import Mix
from planner.placements.placement import Candidate, Mode, WorkerKind
from planner.placements.space import Space


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its goodput and the reason for it not being higher."""

    candidate: Candidate
    rate_rps: float
    devices: int
    cost: float
    why: str

    @property
    def per_device_rps(self) -> float:
        """Goodput of one device."""
        return self.rate_rps / self.devices

    @property
    def per_price(self) -> float:
        """Requests a second for a price of 1 an hour."""
        return self.rate_rps / self.cost


@dataclass(frozen=True, slots=True)
class PlanResult:
    """All of a plan. `ranked` is best first by goodput for price; cautions are for the reader."""

    mix: Mix
    ranked: tuple[Ranked, ...]
    candidates: int
    simulated: int
    hopeless: int
    cautions: tuple[str, ...] = ()

    def best(self, mode: Mode) -> Ranked | None:
        """The best candidate of a mode; None when none met the SLO."""
        return next((one for one in self.ranked if one.candidate.mode is mode), None)

    @property
    def disaggregated_to_colocated(self) -> float | None:
        """Goodput for price of the best disaggregated candidate over that of the best colocated one."""
        split, together = self.best(Mode.DISAGGREGATED), self.best(Mode.COLOCATED)
        return None if split is None or together is None else split.per_price / together.per_price

    @property
    def advice(self) -> str:
        """One sentence: whether to disaggregate."""
        ratio = self.disaggregated_to_colocated
        if ratio is None:
            only = "disaggregated" if self.best(Mode.COLOCATED) is None else "colocated"
            return f"Only {only} candidates were found to meet the objectives."
        if ratio >= 1:
            return f"Disaggregate: {ratio:.2f} x the goodput of colocated workers at equal price."
        return f"Don't disaggregate: colocated workers reach {1 / ratio:.2f} x the goodput at equal price."


def ranking(found: Sequence[Goodput], space: Space, bounds: Bounds) -> tuple[Ranked, ...]:
    """The candidates found, best first for their price."""
    ranked = [
        Ranked(
            one.candidate,
            one.rate_rps,
            sum(one.candidate.devices.values()),
            space.cost(one.candidate),
            why(one, bounds),
        )
        for one in found
    ]
    return tuple(sorted(ranked, key=lambda one: -one.per_price))


def why(found: Goodput, bounds: Bounds) -> str:
    """Which objective failed first above the goodput, and whether memory holds the batch."""
    if found.binding is None:
        return "no rate that was tried failed"
    reason = f"{found.binding.value} fails first, at {found.failing_rps:.3g} req/s"
    limit = bounds.decode(found.candidate.decode or found.candidate.prefill)
    return f"{reason}; KV memory holds the batch at {limit.batch}" if limit.held_by_memory else reason


def plan_json(result: PlanResult) -> dict[str, Any]:
    """Output of `tandem plan --json`."""
    return {
        "goodput_rps": result.mix.rate_rps,
        "cost_per_hour": result.mix.cost,
        "placement": [{"count": count, **_candidate(candidate)} for candidate, count in result.mix.counts],
        "ranked": [
            {
                **_candidate(one.candidate),
                "goodput_rps": one.rate_rps,
                "goodput_per_device_rps": one.per_device_rps,
                "devices": one.devices,
                "cost_per_hour": one.cost,
                "why": one.why,
            }
            for one in result.ranked
        ],
        "disaggregated_to_colocated": result.disaggregated_to_colocated,
        "advice": result.advice,
        "candidates": result.candidates,
        "simulated": result.simulated,
        "hopeless": result.hopeless,
        "cautions": list(result.cautions),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "mode": candidate.mode.value,
        "same_node": candidate.same_node,
        "prefill_workers": candidate.prefill_workers,
        **_kind("prefill", candidate.prefill),
        "decode_workers": candidate.decode_workers,
        **_kind("decode", candidate.decode),
    }


def _kind(role: str, kind: WorkerKind | None) -> dict[str, Any]:
    return {
        f"{role}_device": None if kind is None else kind.device,
        f"{role}_tp": None if kind is None else kind.tp,
        f"{role}_pp": None if kind is None else kind.pp,
    }
