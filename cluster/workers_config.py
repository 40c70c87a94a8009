"""Pure: what cluster.yaml may say of the workers of both pools, and of how long promises hold."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config_section import Seconds, Section


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
