"""Pure: what cluster.yaml may say; every key has a default, and the defaults are the demo on one machine."""

import re
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, field_validator, model_validator

from cluster.config_decoding import SpeculativeSection
from cluster.config_pools import PoolSection, PoolsSection
from cluster.config_section import Name, Port, Seconds, Section
from cluster.config_workers import LeasesSection, WorkersSection
from cluster.controller.config import ControllerSection
from engine.kv_policies.capabilities import KvSettings, kv_fault

REDIS_PASSWORD_ENV = "TANDEM_REDIS_PASSWORD"  # noqa: S105 - the variable's name, not its value
"""Environment variable with the password of an external Redis."""


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
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of weights and KV cache. float16 is not offered: models trained in bfloat16 leave "
        "its range.",
    )
    weights_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="How the weights of matrix products are kept: `auto` as `dtype` says, `int8` in eight "
        "bits (CPU with VNNI only), which changes what is decoded a little.",
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
        "`ray://host:port` another. Start that one with `RAY_worker_niceness=0` in its environment, or its "
        "workers yield their cores to any other process.",
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
    block_size: Literal[4, 8, 16, 32, 64, 128] = Field(default=16, description="Tokens of a KV block.")
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
    controller: ControllerSection = Field(
        default=ControllerSection(), description="Changing how many workers play each role while they serve."
    )

    @property
    def most_added_workers(self) -> int:
        """How many workers the controller may have beyond those of the start."""
        replicas = self.pools.prefill.replicas + self.pools.decode.replicas
        return max(0, (self.controller.max_workers or replicas) - replicas)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ClusterConfig":
        self.controller.check_start(self.pools.prefill.replicas, self.pools.decode.replicas)
        for name, pool in (("prefill", self.pools.prefill), ("decode", self.pools.decode)):
            if self.controller.enabled and pool.cores is not None:
                raise ValueError(
                    f"pools.{name}.cores: shares of cores are cut for the workers of the start; allowed with "
                    "an enabled controller: null"
                )
        if self.default_slo_class not in self.slo_classes:
            allowed = ", ".join(sorted(self.slo_classes))
            raise ValueError(f"default_slo_class: {self.default_slo_class!r} is no class; allowed: {allowed}")
        for name, pool in (("prefill", self.pools.prefill), ("decode", self.pools.decode)):
            if self.model.weights_dtype == "int8" and pool.device != "cpu":
                raise ValueError(
                    f"model.weights_dtype: int8 is for the CPU, and pools.{name}.device is {pool.device}; "
                    "allowed: auto"
                )
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
