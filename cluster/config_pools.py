"""Pure: the section `pools` of cluster.yaml."""

from typing import Annotated, Literal

from pydantic import ByteSize, Field, model_validator

from cluster.config_decoding import KvSelectionSection
from cluster.config_section import MOST_REPLICAS, Port, Section
from cluster.core_shares import cores_fault


class PoolSection(Section):
    """Workers of one role."""

    replicas: int = Field(default=1, ge=1, le=MOST_REPLICAS, description="Number of workers.")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        default="auto",
        description="Torch threads of a worker; `auto` is its share of `cores`, else of this machine's "
        "cores divided among all workers.",
    )
    cores: tuple[Annotated[int, Field(ge=0, le=65_535)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Cores that the pool's workers keep to, in equal shares in this order (`[0, 1]` gives "
        "each of two workers one); null: any core. Pools may not share one.",
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Torch device: `cpu`, `cuda` or `cuda:N`."
    )
    attention: Literal["auto", "flashinfer", "triton", "sdpa"] = Field(
        default="auto",
        description="How a GPU attends; `auto` takes the first of the others that can run the model there.",
    )
    memory: ByteSize = Field(
        default=ByteSize(1 << 30),
        ge=1 << 20,
        description="Memory of the KV pool, like `512MiB`; see `pool_blocks`.",
    )
    pool_blocks: Annotated[int, Field(ge=0, le=10_000_000)] | None = Field(
        default=None,
        description="Size of the KV pool in blocks; replaces `memory` when given. 0 takes what fits a GPU "
        "beside the model.",
    )
    max_waiting: int = Field(
        default=256, ge=1, le=100_000, description="Legs queued at a worker before it refuses."
    )
    prefix_cache: bool = Field(
        default=True, description="Whether KV of finished requests is kept for equal prefixes."
    )
    num_cpus: float = Field(
        default=0.5,
        gt=0,
        le=1024,
        description="CPUs that Ray sets aside for a worker (book-keeping, not a limit).",
    )
    num_gpus: float = Field(default=0, ge=0, le=64, description="GPUs that Ray sets aside for a worker.")
    metrics_port: Port | None = Field(
        default=0,
        description="First port of Prometheus metrics; worker i takes this plus i. 0 lets the system choose "
        "(`tandem status` shows it), null serves none.",
    )

    @model_validator(mode="after")
    def _cores_suffice(self) -> "PoolSection":
        fault = cores_fault(self.cores, self.replicas, self.threads)
        if fault is not None:
            raise ValueError(fault)
        return self


class PrefillPool(PoolSection):
    """Workers that read prompts."""

    token_budget: int = Field(default=512, ge=1, le=1_048_576, description="Most prompt tokens of one step.")
    overlap_min_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = Field(
        default=256,
        description="KV of prompts of so many tokens or more moves to a decode worker while they are read; "
        "null: always afterwards.",
    )


class DecodePool(PoolSection):
    """Workers that write tokens."""

    max_batch: int = Field(
        default=64,
        ge=16,
        le=4096,
        description="Most sequences of one step; at least the 16 samples that one request may ask for.",
    )
    kv_selection: KvSelectionSection = Field(
        default=KvSelectionSection(), description="Which of its KV a decode worker reads, or keeps."
    )


class PoolsSection(Section):
    """The two pools."""

    prefill: PrefillPool = Field(default=PrefillPool(), description="Workers that read prompts.")
    decode: DecodePool = Field(default=DecodePool(), description="Workers that write tokens.")

    @model_validator(mode="after")
    def _share_no_core(self) -> "PoolsSection":
        shared = sorted(set(self.prefill.cores or ()) & set(self.decode.cores or ()))
        if shared:
            raise ValueError(f"decode.cores: core {shared[0]} is one of prefill.cores; allowed: others")
        return self
