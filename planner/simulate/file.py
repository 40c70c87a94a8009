"""Pure: what sim.yaml may say."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from planner.plan.file import (
    Count,
    Degree,
    FleetFile,
    LengthSection,
    NodesSection,
    Path,
    Rate,
    Seconds,
    Section,
)
from tandem.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class SimWorkloadSection(Section):
    """Requests: of a trace, of one of its length distributions, or of the cluster's request log.

    `arrivals` trace keeps the trace's own times, stretched to `rate_rps` if that is given; the others draw
    times at that rate. `lengths` empirical draws from the trace with replacement.
    """

    trace: Path | None = None
    prompt_tokens: LengthSection | Count | None = None
    output_tokens: LengthSection | Count | None = None
    lengths: Literal["in_order", "empirical"] = "in_order"
    arrivals: Literal["trace", "poisson", "gamma", "fixed"] = "poisson"
    rate_rps: Rate | None = None
    variation: Annotated[float, Field(gt=0, le=100)] = 1.0
    requests: Annotated[int, Field(ge=1, le=100_000_000)] = 1000

    @model_validator(mode="after")
    def _one_source(self) -> "SimWorkloadSection":
        drawn = self.prompt_tokens is not None and self.output_tokens is not None
        partly = self.prompt_tokens is not None or self.output_tokens is not None
        if (self.trace is not None) == partly or partly != drawn:
            raise ValueError("give either trace, or prompt_tokens and output_tokens")
        if self.arrivals == "trace" and self.trace is None:
            raise ValueError("arrivals of kind trace need a trace")
        if self.arrivals != "trace" and self.rate_rps is None:
            raise ValueError(f"arrivals of kind {self.arrivals} need rate_rps")
        return self


class ClassSection(Section):
    """An SLO class: objectives in seconds, and its share of the requests."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    ttft_s: Seconds
    tpot_s: Seconds
    longest_gap_s: Seconds = 86_400.0
    share: Share = 1.0


class PoolSection(Section):
    """Equal workers on one kind of device. `policy` is for colocated ones; `node` places them together.

    `pool_blocks` replaces what fits into the devices' memory.
    """

    role: Literal["prefill", "decode", "colocated"]
    count: Annotated[int, Field(ge=1, le=4096)] = 1
    device: str
    tp: Degree = 1
    pp: Degree = 1
    node: str = ""
    policy: Literal["sarathi", "prefill_first", "mlfq"] = "sarathi"
    pool_blocks: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    token_budget: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    max_batch: Annotated[int, Field(ge=1, le=65_536)] = 256
    whole_prompts: bool = False
    prefix_cache: bool = False


class FaultSection(Section):
    """What goes wrong, or is ordered, at a worker; workers are named role-number, from 0."""

    at_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    kind: Literal["death", "revival", "flip", "transfer failure"]
    worker: str


class LimitsSection(Section):
    """The router's limits; see cluster.yaml."""

    dispatch: Literal["round_robin", "least_loaded", "prefix_aware"] = "least_loaded"
    context_tokens: Count = 131_072
    max_queued: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000
    max_active: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000
    max_replacements: Annotated[int, Field(ge=0, le=1000)] = 16
    request_timeout_s: Seconds = 600.0
    park_requests_s: Seconds = 30.0
    prefill_window_tokens: Annotated[int, Field(ge=1, le=1 << 31)] = 16_384
    decode_window_legs: Annotated[int, Field(ge=1, le=1_000_000)] = 16


class SimFile(FleetFile):
    """All of sim.yaml. `drive` says what is driven: see planner/simulation/setup.py."""

    workers: tuple[PoolSection, ...] = Field(min_length=1, max_length=64)
    workload: SimWorkloadSection
    classes: tuple[ClassSection, ...] = Field(min_length=1, max_length=32)
    router: LimitsSection = LimitsSection()
    faults: tuple[FaultSection, ...] = ()
    seed: int = 0
    drive: Literal["auto", "runs", "steps"] = "auto"

    def nodes(self, device: str) -> NodesSection:
        """The nodes with that device. Raises ConfigError when there are none."""
        for nodes in self.hardware:
            if nodes.device == device:
                return nodes
        known = ", ".join(nodes.device for nodes in self.hardware)
        raise ConfigError(f"workers: device {device!r} is not under hardware, which has {known}")
