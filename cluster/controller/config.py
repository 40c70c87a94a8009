"""Pure: the section `controller` of cluster.yaml."""

from typing import Annotated

from pydantic import ByteSize, Field, model_validator

from cluster.config_section import MOST_REPLICAS, Port, Seconds, Section

Factor = Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)]
Replicas = Annotated[int, Field(ge=1, le=MOST_REPLICAS)]
Workers = Annotated[int, Field(ge=2, le=2 * MOST_REPLICAS)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096)]


class RoleLimits(Section):
    """How many workers of a role the controller may want."""

    min: Replicas = Field(default=1, description="Fewest workers.")
    max: Replicas = Field(default=MOST_REPLICAS, description="Most workers.")


class ControllerSection(Section):
    """The online controller (docs/planning.md): it changes how many workers play each role."""

    enabled: bool = Field(default=False, description="Whether `tandem up` runs a controller.")
    dry_run: bool = Field(
        default=False, description="Whether it only prints what it would change, and writes nothing."
    )
    plan: FilePath | None = Field(
        default=None,
        description="A plan.yaml whose first hardware, model and objectives say what a worker can do.",
    )
    log: FilePath | None = Field(
        default=None,
        description="File that gets a line of JSON for each window and its decision; "
        "`tandem controller replay` decides anew on it. null: off.",
    )
    log_bytes: ByteSize = Field(
        default=ByteSize(64 << 20),
        ge=1 << 16,
        description="Size at which that log is set aside as `.1`; the last 4 are kept.",
    )
    window_s: Seconds = Field(default=60.0, description="How long load is measured for one decision.")
    dwell_s: float = Field(
        default=180.0, ge=0, le=86_400, allow_inf_nan=False, description="Shortest time between two changes."
    )
    gain: Factor = Field(
        default=1.25, description="Hysteresis: a new placement must serve so many times as much."
    )
    headroom: Factor = Field(default=1.1, description="The load is taken as so many times what was measured.")
    patience: int = Field(
        default=2, ge=1, le=1000, description="Windows, of the last so many + 1, that must be short."
    )
    calm_windows: int = Field(
        default=10, ge=1, le=100_000, description="Calm windows in a row before a worker is given back."
    )
    spare: Factor = Field(
        default=1.5, description="Calm is a load that one worker less could serve so many times."
    )
    flip: bool = Field(default=True, description="Whether workers may change their role.")
    min_workers: Workers | None = Field(
        default=None, description="Fewest workers of both roles; by default those of the start."
    )
    max_workers: Workers | None = Field(
        default=None, description="Most workers of both roles; by default those of the start."
    )
    prefill: RoleLimits = Field(default=RoleLimits(), description="Limits of the prefill workers.")
    decode: RoleLimits = Field(default=RoleLimits(), description="Limits of the decode workers.")
    metrics_port: Port | None = Field(
        default=None, description="Port of the controller's own Prometheus metrics; null serves none."
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ControllerSection":
        if self.enabled and self.plan is None:
            raise ValueError("plan: an enabled controller needs one; allowed: the path of a plan.yaml")
        for name, limits in (("prefill", self.prefill), ("decode", self.decode)):
            if limits.min > limits.max:
                raise ValueError(f"{name}.min: {limits.min} is more than max; allowed: 1 to {limits.max}")
        return self

    def check_start(self, prefill: int, decode: int) -> None:
        """Raises ValueError when a cluster would start outside the limits of its controller."""
        if not self.enabled:
            return
        for name, limits, replicas in (("prefill", self.prefill, prefill), ("decode", self.decode, decode)):
            if not limits.min <= replicas <= limits.max:
                raise ValueError(
                    f"pools.{name}.replicas: {replicas} is outside of controller.{name}; "
                    f"allowed: {limits.min} to {limits.max}"
                )
        total = prefill + decode
        fewest, most = self.min_workers or total, self.max_workers or total
        if not fewest <= total <= most:
            raise ValueError(
                f"controller.min_workers, max_workers: {total} workers start; allowed: min_workers up to "
                f"{total}, max_workers from {total}"
            )
