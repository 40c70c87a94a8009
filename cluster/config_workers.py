"""Pure: what cluster.yaml may say of the workers of both pools, and of how long promises hold."""

from typing import Literal

from pydantic import ByteSize, Field, model_validator

from cluster.config_section import Seconds, Section


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
    kv_arena: str | None = Field(
        default=None,
        pattern=r"^/",
        max_length=4096,
        description="A file, in a tmpfs (`/dev/shm/NAME`) or a hugetlbfs, in which the workers of a host "
        "have their pools (CPU only): prefill workers without `prefix_cache` then give KV away instead of "
        "having it copied. A worker that cannot have the file says so, and its KV is copied; null: all is.",
    )
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
