"""Pure: the cluster.yaml of a plan, as `tandem up` accepts it."""

from typing import Any

import yaml

from planner.placements.mix import Mix
from planner.placements.placement import Candidate, Mode, WorkerKind
from planner.placements.space import Workers
from planner.plan.file import PlanFile
from tandem.errors import ConfigError

SLO_CLASS = "planned"
"""Name of the class with the plan's objectives."""


def cluster_yaml(
    plan: PlanFile, mix: Mix, workers: Workers, kv_bytes_per_token: int, model_source: str
) -> str:
    """The YAML, with one comment on where it is from.

    Raises ConfigError for a mix that `tandem up` cannot run: it starts workers of one device each, split by
    role, all workers of a role alike.
    """
    candidate, count = _runnable(mix)
    if candidate.decode is None:
        raise ConfigError(_CANNOT.format("colocated workers"))
    document: dict[str, Any] = {
        "model": {"source": model_source},
        "block_size": plan.block_size,
        "pools": {
            "prefill": {
                "replicas": count * candidate.prefill_workers,
                **_pool(candidate.prefill, workers, kv_bytes_per_token),
                "token_budget": plan.token_budget,
                **_overlap(plan),
            },
            "decode": {
                "replicas": count * candidate.decode_workers,
                **_pool(candidate.decode, workers, kv_bytes_per_token),
                "max_batch": plan.max_batch,
            },
        },
        "slo_classes": {
            SLO_CLASS: {
                "ttft_s": plan.slo.ttft_s,
                "tpot_s": plan.slo.tpot_s,
                "longest_gap_s": plan.slo.longest_gap_s,
            }
        },
        "default_slo_class": SLO_CLASS,
    }
    said = f"# tandem plan: {mix.rate_rps:.4g} req/s at {plan.slo.attainment:.0%} attainment, simulated\n"
    return said + yaml.safe_dump(document, sort_keys=False)


def _overlap(plan: PlanFile) -> dict[str, Any]:
    """From which length on KV moves early, as it was simulated; else the cluster's own default stands."""
    least = plan.overlap_min_tokens
    return {} if least is None else {"overlap_min_tokens": least}


def _pool(kind: WorkerKind, workers: Workers, kv_bytes_per_token: int) -> dict[str, Any]:
    on_cpu = kind.device.startswith("cpu")
    return {
        "device": "cpu" if on_cpu else "cuda",
        "num_gpus": 0 if on_cpu else 1,
        "memory": workers.kv_tokens(kind) * kv_bytes_per_token,
    }


_CANNOT = (
    "`tandem up` can't run this plan, it has {}; plan again with search.tp: [1], search.pp: [1], "
    "search.modes: [disaggregated] and one kind of hardware, or leave out -o"
)


def _runnable(mix: Mix) -> tuple[Candidate, int]:
    if len(mix.counts) > 1:
        raise ConfigError(_CANNOT.format("several kinds of placement side by side"))
    candidate, count = mix.counts[0]
    kinds = [kind for kind in (candidate.prefill, candidate.decode) if kind is not None]
    if any(kind.devices > 1 for kind in kinds):
        raise ConfigError(_CANNOT.format("workers of several devices"))
    if candidate.mode is Mode.COLOCATED:
        raise ConfigError(_CANNOT.format("colocated workers"))
    if len({kind.device for kind in kinds}) > 1:
        raise ConfigError(_CANNOT.format("a device for each role"))
    return candidate, count
