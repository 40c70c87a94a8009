"""Pure: what cluster.yaml may say; every key has a default, and the defaults are the demo on one machine."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, field_validator, model_validator

from cluster.config_pools import PoolsSection
from cluster.config_section import Name, Port, Seconds, Section
from cluster.controller.config import ControllerSection

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


class SpeculativeSection(Section):
    """Guessing tokens and verifying several in one step (speculative decoding), on decode workers."""

    method: Literal["none", "ngram", "draft_model", "medusa", "eagle"] = Field(
        default="none",
        description="Who guesses: `ngram` looks the last tokens up in the text so far, `draft_model` is a "
        "smaller model, `medusa` and `eagle` are heads trained for the model.",
    )
    tokens: int = Field(default=8, ge=1, le=64, description="Most guesses of a sequence verified in a step.")
    source: str | None = Field(
        default=None,
        max_length=4096,
        description="The draft model (named as `model.source` is; same tokenizer) or the heads' folder.",
    )
    acceptance: Literal["exact", "rejection"] = Field(
        default="exact",
        description="`exact` gives the very tokens of a cluster that does not guess; `rejection`, for "
        "`draft_model`, gives sampled output of the same distribution with more guesses accepted.",
    )
    min_ngram: int = Field(default=2, ge=1, le=16, description="Shortest match of `ngram`, in tokens.")
    max_ngram: int = Field(default=4, ge=1, le=16, description="Longest match of `ngram`, in tokens.")
    pool_blocks: int = Field(
        default=1024, ge=1, le=10_000_000, description="KV pool of a draft model or EAGLE head, in blocks."
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "SpeculativeSection":
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram: {self.min_ngram} is more than max_ngram; allowed: 1 to {self.max_ngram}"
            )
        if self.method in ("draft_model", "medusa", "eagle") and self.source is None:
            raise ValueError(f"source: method {self.method} needs one; allowed: a model or folder")
        if self.acceptance == "rejection" and self.method != "draft_model":
            raise ValueError("acceptance: rejection needs method draft_model; allowed: exact")
        return self


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


class TlsSection(Section):
    """PEM files on every worker's host; both ends of a connection prove themselves (TLS 1.3).

    They are read for every new connection, so that renewed certificates need no restart.
    """

    cert: str = Field(min_length=1, max_length=4096, description="The worker's certificate, with its chain.")
    key: str = Field(min_length=1, max_length=4096, description="The certificate's key, not encrypted.")
    ca: str = Field(
        min_length=1,
        max_length=4096,
        description="The authority: a peer whose certificate it did not sign is refused, by either end.",
    )


class NcclSection(Section):
    """Bounds on what NCCL may take; each pair of workers that uses it has a communicator of its own."""

    max_communicators: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Open ones of a worker's side; the least recently used is closed first. What they take "
        "of the device is in the metric `tandem_worker_nccl_bytes`.",
    )
    staging: ByteSize = Field(
        default=ByteSize(32 << 20),
        ge=128 << 10,
        le=2 << 30,
        description="Device memory of a communicator for bytes on their way, two halves of it; the prefill "
        "worker's holds for a pair.",
    )
    open_s: Seconds = Field(
        default=15.0, description="Bound of opening one; the pair takes the next transport meanwhile."
    )
    abort_s: Seconds = Field(
        default=1.0, description="Bound of an abort; a worker whose abort hangs longer is restarted."
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
    tls: TlsSection | None = Field(
        default=None,
        description="Encrypts KV that moves over `tcp`; null: in the clear. The other transports and the "
        "control plane are not encrypted.",
    )
    nccl: NcclSection = Field(default=NcclSection(), description="Bounds on what NCCL may take.")

    @model_validator(mode="after")
    def _codec_has_its_thresholds(self) -> "WorkersSection":
        if (self.codec == "oaken") != (self.codec_thresholds is not None):
            raise ValueError("codec_thresholds: belongs to codec oaken, which needs it")
        return self

    @model_validator(mode="after")
    def _tls_has_its_transport(self) -> "WorkersSection":
        if self.tls is not None and "tcp" not in self.transports:
            raise ValueError("tls: belongs to the transport tcp; allowed: transports with tcp")
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
        if self.redis.url == "embedded" and self.ray.address != "local":
            raise ValueError(
                "redis.url: the embedded one is on loopback and its password is known to local workers only; "
                "allowed with this ray.address: redis://host:port/db, rediss://host:port/db"
            )
        if self.redis.tls_ca is not None and not self.redis.url.startswith("rediss://"):
            raise ValueError("redis.tls_ca: needs a redis.url that starts with rediss://")
        return self
