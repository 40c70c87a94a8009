"""Pure: what plan.yaml may say."""

from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Degree = Annotated[int, Field(ge=1, le=64)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(BaseModel):
    """A mapping of plan.yaml: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """Dimensions of a model that the catalogue does not know."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate: Count
    vocabulary: Annotated[int, Field(ge=1, le=10_000_000)]
    mlp_matrices: Literal[2, 3] = 3
    tied_embeddings: bool = False
    value_bytes: Literal[1, 2, 4] = 2


class LatencySection(Section):
    """Where step times of a device come from.

    `roofline` needs no file; with `file`, a profile of `tandem profile` of the same model on one such
    device, it learns a correction for workers of one device. `profile` interpolates such a file.
    `distserve` reads DistServe's coefficients, `key` names the model in it. `operators` composes vidur's
    tables: `file` of linear ops, `all_reduce` and `send_recv` of links.
    """

    kind: Literal["roofline", "profile", "distserve", "operators"] = "roofline"
    file: Path | None = None
    key: str | None = None
    all_reduce: Path | None = None
    send_recv: Path | None = None

    @model_validator(mode="after")
    def _has_its_file(self) -> "LatencySection":
        if self.kind != "roofline" and self.file is None:
            raise ValueError(f"latency of kind {self.kind} needs a file")
        if self.kind == "distserve" and self.key is None:
            raise ValueError("latency of kind distserve needs key, the model's name in the file")
        return self


class NodesSection(Section):
    """Equal nodes; `device` is a name of the catalogue, `memory` replaces the memory it has there."""

    device: str
    nodes: Annotated[int, Field(ge=1, le=1024)]
    devices_per_node: Annotated[int, Field(ge=1, le=64)]
    price_per_hour: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    memory: ByteSize | None = None
    latency: LatencySection = LatencySection()


class LengthSection(Section):
    """Lognormal lengths in tokens: mean, coefficient of variation, and the most there can be."""

    mean: Annotated[float, Field(gt=0, le=1e6)]
    variation: Annotated[float, Field(gt=0, le=100)] = 1.0
    most: Count = 8192


class WorkloadSection(Section):
    """Requests: drawn lengths, or those of a trace; arrivals are drawn at the rate that is tried.

    A run has `requests` requests and lasts `seconds` at least, so that queues show that grow slowly, but has
    no more than 20 times `requests`; the first of them, a share of `uncounted`, do not count, since the
    cluster is empty at first. A run of each seed counts. `buckets` divides requests by the length of their
    prompt, so that each may be served by hardware of its own (Melange); the cluster's router does not do
    that, so 1 is what `tandem up` can run.
    """

    trace: Path | None = None
    prompt_tokens: LengthSection | None = None
    output_tokens: LengthSection | None = None
    arrivals: Literal["poisson", "gamma", "fixed"] = "poisson"
    variation: Annotated[float, Field(gt=0, le=100)] = 1.0
    requests: Annotated[int, Field(ge=50, le=1_000_000)] = 1000
    seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    uncounted: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1, max_length=20)
    buckets: Annotated[int, Field(ge=1, le=8)] = 1

    @model_validator(mode="after")
    def _one_source(self) -> "WorkloadSection":
        drawn = self.prompt_tokens is not None and self.output_tokens is not None
        partly = self.prompt_tokens is not None or self.output_tokens is not None
        if (self.trace is not None) == partly or partly != drawn:
            raise ValueError("give either trace, or prompt_tokens and output_tokens")
        return self


class SloSection(Section):
    """Objectives in seconds; `attainment` is the share of all requests that must meet all three."""

    ttft_s: Seconds
    tpot_s: Seconds
    longest_gap_s: Seconds = 86_400.0
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.9


class SearchSection(Section):
    """What is tried. `keep` candidates of every kind are known exactly; `processes` 0 is one a core."""

    tp: tuple[Degree, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    pp: tuple[Degree, ...] = Field(default=(1, 2, 4), min_length=1)
    most_workers: Annotated[int, Field(ge=1, le=64)] = 4
    affinity: Literal["high", "low", "auto"] = "auto"
    modes: tuple[Literal["disaggregated", "colocated"], ...] = Field(
        default=("disaggregated", "colocated"), min_length=1
    )
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    tolerance: Annotated[float, Field(gt=0.0001, le=0.2)] = 0.01
    slack: Annotated[float, Field(ge=0, le=1)] = 0.05
    processes: Annotated[int, Field(ge=0, le=256)] = 0


Hop = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class HopsSection(Section):
    """What messages take, in seconds: of a request between its client and the router, there and back; one way
    from the router to a worker; one way from a worker to the router.
    """

    front_door_s: Hop = 0.0
    to_worker_s: Hop = 0.0
    to_router_s: Hop = 0.0


class FleetFile(Section):
    """What plan.yaml and sim.yaml share: a model, and hardware that it runs on.

    `hand_over_s` is what a hand-off takes beside its bytes, `ask_s` what each piece takes that moves before
    the last one. KV of prompts of `overlap_min_tokens` or more moves while they are read; null: of none.
    """

    model: str | ModelSection
    hardware: tuple[NodesSection, ...] = Field(min_length=1, max_length=16)
    network_gbps: Annotated[float, Field(gt=0, le=100_000)] = 25.0
    hand_over_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    ask_s: Hop = 0.0
    hops: HopsSection = HopsSection()
    overlap_min_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    memory_use: Annotated[float, Field(gt=0, le=1)] = 0.9
    block_size: Literal[8, 16, 32, 64, 128] = 16


class PlanFile(FleetFile):
    """All of plan.yaml. Without `rate_rps` the fleet's most is asked for, with it the cheapest to serve it.

    `whole_prompts`: prefill workers batch as DistServe's do, no prompt is cut.
    """

    workload: WorkloadSection
    slo: SloSection
    rate_rps: Rate | None = None
    token_budget: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    max_batch: Annotated[int, Field(ge=16, le=4096)] = 256
    whole_prompts: bool = False
    colocated_policy: Literal["prefill_first", "sarathi", "mlfq"] = "sarathi"
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _devices_once(self) -> "PlanFile":
        names = [group.device for group in self.hardware]
        if len(set(names)) < len(names):
            raise ValueError("hardware: a device has two entries; give each device one")
        return self
