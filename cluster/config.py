"""Pure: what cluster.yaml may say; every key has a default, and the defaults are the demo on one machine."""

import re
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, field_validator, model_validator

from cluster.decode_config import KvSelectionSection, SpeculativeSection
from cluster.section import Section
from engine.kv_policies.capabilities import KvSettings, kv_fault

REDIS_PASSWORD_ENV = "TANDEM_REDIS_PASSWORD"  # noqa: S105 - the variable's name, not its value
"""Environment variable with the password of an external Redis."""

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ModelSection(Section):
    """Which model is served."""

    source: str = Field(
        default="smollm2",
        min_length=1,
        max_length=4096,
        description="`smollm2`, a GGUF file, or a Hugging Face folder with safetensors.",
    )
    name: Name | None = Field(
        default=None,
        description="Name that clients use; by default the last part of `source` without its ending.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of weights and KV cache."
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="How the KV cache is stored: `auto` as `dtype` says, `int8` in eight bits with a scale "
        "for each head's K or V of a token (CPU only, `workers.codec` identity).",
    )
    context: Annotated[int, Field(ge=16, le=1_048_576)] | None = Field(
        default=None,
        description="Most tokens of prompt and output together; by default what the model was made for.",
    )


class PoolSection(Section):
    """Workers of one role."""

    replicas: int = Field(default=1, ge=1, le=1024, description="Number of workers.")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        default="auto",
        description="Torch threads of a worker; `auto` divides this machine's cores among all workers.",
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
        default=KvSelectionSection(), description="Which of its KV a decode worker reads."
    )


class PoolsSection(Section):
    """The two pools."""

    prefill: PrefillPool = Field(default=PrefillPool(), description="Workers that read prompts.")
    decode: DecodePool = Field(default=DecodePool(), description="Workers that write tokens.")


class SloSection(Section):
    """Objectives of one class; a request is good if it meets all three."""

    ttft_s: Seconds = Field(description="Time to first token.")
    tpot_s: Seconds = Field(description="Mean time per output token after the first.")
    longest_gap_s: Seconds = Field(description="Longest gap between two tokens.")


class PoliciesSection(Section):
    """Which decision makers are used."""

    dispatch: Literal["round_robin", "least_loaded", "prefix_aware"] = Field(
        default="prefix_aware", description="How a worker is chosen for a request."
    )


class RouterSection(Section):
    """The front door."""

    bind_host: str = Field(
        default="127.0.0.1", min_length=1, max_length=255, description="Address that both ports bind."
    )
    grpc_port: Port = Field(default=50051, description="gRPC; 0 lets the system choose.")
    http_port: Port = Field(
        default=8000, description="OpenAI HTTP, health and metrics; 0 lets the system choose."
    )
    max_queued: int = Field(
        default=256, ge=1, le=100_000, description="Requests waiting for a prefill worker; more get 429."
    )
    max_active: int = Field(default=1024, ge=1, le=100_000, description="Requests admitted and unfinished.")
    max_replacements: int = Field(
        default=16, ge=0, le=1000, description="How often one request is placed anew after failures."
    )
    request_timeout_s: Seconds = Field(default=600.0, description="Longest life of a request.")
    park_requests_s: Seconds = Field(
        default=30.0, description="How long a request waits for a worker to come back before it fails."
    )
    canary_interval_s: Seconds = Field(
        default=5.0, description="How often an idle cluster proves itself with a request of its own."
    )
    request_log: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="File that gets a line of JSON for each request that ended: times, lengths and outcome, "
        "no text; `tandem simulate` reads it as a workload. null: off.",
    )
    request_log_bytes: ByteSize = Field(
        default=ByteSize(64 << 20),
        ge=1 << 12,
        description="Size at which the request log is set aside as `.1`; the last 4 are kept.",
    )


class WorkersSection(Section):
    """What holds for the workers of both pools."""

    bind_host: str = Field(
        default="127.0.0.1", min_length=1, max_length=255, description="Address that workers bind."
    )
    advertise_host: str = Field(
        default="auto",
        min_length=1,
        max_length=255,
        description="Address under which others reach a worker; `auto` is `bind_host`, or the node's "
        "address when that is `0.0.0.0`.",
    )
    transports: tuple[Literal["nccl", "cuda_ipc", "shm", "tcp"], ...] = Field(
        default=("shm", "tcp"),
        min_length=1,
        description="How KV may move, best first; `nccl` and `cuda_ipc` move pools on GPUs, "
        "and workers that cannot do one take the next.",
    )
    checksum: bool = Field(default=True, description="Whether moved KV is verified.")
    codec: Literal["identity", "fp8", "int8", "oaken"] = Field(
        default="identity",
        description="How KV is written on its way: as it is, in eight bits (`fp8`, `int8`), or in about five "
        "(`oaken`); all but `identity` change what is decoded a little.",
    )
    codec_thresholds: str | None = Field(
        default=None,
        max_length=4096,
        description="File of thresholds that `oaken` needs, equal on every host; made by "
        "`python -m benchmarks.kv_codecs`.",
    )

    @model_validator(mode="after")
    def _codec_has_its_thresholds(self) -> "WorkersSection":
        if (self.codec == "oaken") != (self.codec_thresholds is not None):
            raise ValueError("codec_thresholds: belongs to codec oaken, which needs it")
        return self


class LeasesSection(Section):
    """How long promises hold."""

    registry_s: Seconds = Field(
        default=2.0, description="A worker that does not renew within it is taken for dead."
    )
    handoff_s: Seconds = Field(default=5.0, description="How long a source keeps blocks still for one pull.")
    park_s: Seconds = Field(
        default=30.0, description="How long a prefill worker keeps KV that nobody fetches."
    )


class RedisSection(Section):
    """The registry."""

    url: str = Field(
        default="embedded",
        max_length=1024,
        description="`embedded` starts one on this machine; else `redis://host:port/db` or `rediss://...`. "
        f"The password comes from the environment variable {REDIS_PASSWORD_ENV}.",
    )
    tls_ca: str | None = Field(
        default=None, max_length=4096, description="PEM file with the authority of a `rediss://` server."
    )
    namespace: Name = Field(
        default="tandem", description="Prefix of all keys; one for each cluster in a Redis."
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url == "embedded":
            return url
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError("allowed: embedded, redis://host:port/db, rediss://host:port/db")
        if parts.password is not None:
            raise ValueError(f"a password does not belong into the file; set {REDIS_PASSWORD_ENV}")
        return url


class RaySection(Section):
    """Where the workers' processes come from."""

    address: str = Field(
        default="local",
        max_length=1024,
        description="`local` starts a Ray of its own, `auto` joins the one on this machine, "
        "`ray://host:port` another.",
    )
    object_store_memory: ByteSize = Field(
        default=ByteSize(80_000_000), ge=78_643_200, description="Ray's shared memory, `local` only."
    )
    start_timeout_s: Seconds = Field(
        default=120.0, description="How long `tandem up` waits until everything serves."
    )
    drain_timeout_s: Seconds = Field(
        default=20.0, description="How long running requests may go on when the cluster stops."
    )

    @field_validator("address")
    @classmethod
    def _known_address(cls, address: str) -> str:
        if address in ("local", "auto") or re.fullmatch(r"ray://[^/\s]+:\d{1,5}", address):
            return address
        raise ValueError("allowed: local, auto, ray://host:port")


def _default_slo_classes() -> dict[str, SloSection]:
    return {
        "interactive": SloSection(ttft_s=2.0, tpot_s=0.2, longest_gap_s=1.0),
        "batch": SloSection(ttft_s=60.0, tpot_s=1.0, longest_gap_s=10.0),
    }


class ClusterConfig(Section):
    """All of cluster.yaml."""

    model: ModelSection = Field(default=ModelSection(), description="Which model is served.")
    block_size: Literal[8, 16, 32, 64, 128] = Field(default=16, description="Tokens of a KV block.")
    pools: PoolsSection = Field(default=PoolsSection(), description="The two pools of workers.")
    workers: WorkersSection = Field(
        default=WorkersSection(), description="What holds for the workers of both pools."
    )
    slo_classes: dict[Name, SloSection] = Field(
        default_factory=_default_slo_classes,
        min_length=1,
        max_length=32,
        description="Latency objectives by class name.",
    )
    default_slo_class: str = Field(
        default="interactive", description="Class of requests that name none; one of `slo_classes`."
    )
    policies: PoliciesSection = Field(
        default=PoliciesSection(), description="Which decision makers are used."
    )
    speculative: SpeculativeSection = Field(
        default=SpeculativeSection(), description="Guessing tokens on decode workers."
    )
    router: RouterSection = Field(default=RouterSection(), description="The front door.")
    leases: LeasesSection = Field(default=LeasesSection(), description="How long promises hold.")
    redis: RedisSection = Field(default=RedisSection(), description="The registry.")
    ray: RaySection = Field(default=RaySection(), description="Where the workers' processes come from.")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ClusterConfig":
        if self.default_slo_class not in self.slo_classes:
            allowed = ", ".join(sorted(self.slo_classes))
            raise ValueError(f"default_slo_class: {self.default_slo_class!r} is no class; allowed: {allowed}")
        for name, pool in (("prefill", self.pools.prefill), ("decode", self.pools.decode)):
            if pool.pool_blocks is None or self.model.context is None:
                continue
            needed = -(-self.model.context // self.block_size)
            if pool.pool_blocks < needed:
                raise ValueError(
                    f"pools.{name}.pool_blocks: {pool.pool_blocks} blocks cannot hold one context of "
                    f"{self.model.context} tokens; allowed: {needed} or more"
                )
        for name, settings in (("prefill", self._kv_of(self.pools.prefill)), ("decode", self._decode_kv())):
            if (fault := kv_fault(settings)) is not None:
                raise ValueError(f"pools.{name}: {fault}")
        if self.redis.url == "embedded" and self.ray.address != "local":
            raise ValueError(
                "redis.url: the embedded one is on loopback and its password is known to local workers only; "
                "allowed with this ray.address: redis://host:port/db, rediss://host:port/db"
            )
        if self.redis.tls_ca is not None and not self.redis.url.startswith("rediss://"):
            raise ValueError("redis.tls_ca: needs a redis.url that starts with rediss://")
        return self

    def _kv_of(self, pool: PoolSection) -> KvSettings:
        kv_dtype = self.model.dtype if self.model.kv_dtype == "auto" else self.model.kv_dtype
        return KvSettings(kv_dtype, device=pool.device, codec=self.workers.codec)

    def _decode_kv(self) -> KvSettings:
        pool = self.pools.decode
        speculates = self.speculative.method != "none"
        return replace(self._kv_of(pool), selection=pool.kv_selection.policy, speculates=speculates)
