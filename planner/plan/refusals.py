"""Pure: one sentence for each plan that cannot be, with what would be needed."""

from collections.abc import Sequence

from planner.placements.bound import Bounds
from planner.placements.mix import Mix
from planner.placements.placement import Slo, WorkerKind
from planner.placements.space import Space, all_kinds
from planner.plan.workers import PlannedWorkers
from tandem.errors import ConfigError


def fits_nowhere(space: Space, workers: PlannedWorkers, longest_tokens: int) -> ConfigError:
    """No kind of worker holds weights and one request."""
    model = workers.model
    needed = model.weight_bytes + longest_tokens * model.kv_bytes_per_token
    kinds = [kind for group in space.groups for kind in all_kinds(space, group)]
    usable = [kind for kind in kinds if workers.latency(kind) is not None]
    if not usable:
        return ConfigError(
            f"{model.name} has no step times for any worker of this hardware with tp {_list(space.tp)} and "
            f"pp {_list(space.pp)}; give a latency file that has one of them, or latency.kind roofline"
        )
    largest = max(usable, key=lambda kind: kind.devices * workers.memory_bytes(kind.device))
    has = max(0.0, workers.kv_tokens(largest) * model.kv_bytes_per_token + model.weight_bytes)
    count = -(-needed * largest.devices // max(1.0, has))
    return ConfigError(
        f"{model.name} fits nowhere: weights and the KV of one request of {longest_tokens} tokens need "
        f"{needed / 1e9:.1f} GB, the largest worker ({largest}) has {has / 1e9:.1f} GB for them; it would "
        f"take a worker of {count:.0f} {largest.device}, or devices with more memory"
    )


def impossible_slo(kinds: Sequence[WorkerKind], bounds: Bounds, slo: Slo) -> ConfigError:
    """No candidate meets the objectives at any rate that was tried."""
    quickest = min(kinds, key=bounds.idle_ttft_s)
    ttft_s = bounds.idle_ttft_s(quickest)
    if ttft_s > slo.ttft_s:
        return ConfigError(
            f"no placement meets a time to first token of {slo.ttft_s:g} s for {slo.attainment:.0%} of "
            f"requests: even idle, the quickest worker ({quickest}) needs {ttft_s:.3g} s; ask for that or "
            "more, for a lower attainment, or give faster hardware"
        )
    steadiest = min(kinds, key=bounds.idle_tpot_s)
    tpot_s = bounds.idle_tpot_s(steadiest)
    if tpot_s > slo.tpot_s:
        return ConfigError(
            f"no placement meets a time per token of {slo.tpot_s:g} s: even alone, a sequence on the "
            f"quickest worker ({steadiest}) takes {tpot_s:.3g} s a token; ask for that or more, or give "
            "faster hardware"
        )
    return ConfigError(
        f"no placement meets all objectives together for {slo.attainment:.0%} of requests, although an idle "
        f"worker reaches {ttft_s:.3g} s to the first and {tpot_s:.3g} s for each token: relax "
        f"slo.longest_gap_s ({slo.longest_gap_s:g} s) or the attainment"
    )


def not_enough_devices(asked_rps: float, largest: Mix, space: Space) -> ConfigError:
    """The fleet cannot bear the rate."""
    devices = sum(group.devices for group in space.groups)
    needed = -(-devices * asked_rps // largest.rate_rps)
    return ConfigError(
        f"{asked_rps:g} req/s are more than these {devices} devices bear: at most {largest.rate_rps:.3g} "
        f"req/s; it would take about {needed:.0f} devices of this mix, or a lower rate_rps"
    )


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
