"""Pure: what `tandem profile` writes: measured step times and transfers of one machine and model."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.latency import PromptPart, StepShape
from planner.step_times.transfer_links import LinkTable
from tandem.errors import ConfigError

Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class MeasuredStep(_Part):
    """One step that was measured; `prompts` are (tokens, context tokens), `seconds` is the median of
    `runs`."""

    prompts: tuple[tuple[Annotated[int, Field(ge=1)], Count], ...] = ()
    decode_batch: Count = 0
    decode_context_tokens: Count = 0
    seconds: Seconds
    runs: Annotated[int, Field(ge=1)] = 1

    @property
    def shape(self) -> StepShape:
        """The step as a latency model is asked for it."""
        parts = tuple(PromptPart(tokens, context) for tokens, context in self.prompts)
        return StepShape(parts, self.decode_batch, self.decode_context_tokens)


class MeasuredTransfer(_Part):
    """One transfer of KV that was measured."""

    transport: str
    bytes: Annotated[int, Field(ge=1)]
    seconds: Seconds


class Profile(_Part):
    """The whole file; keys that are not named here are for its reader, not for the planner."""

    version: Literal[1]
    kind: Literal["tandem profile"]
    points: tuple[MeasuredStep, ...] = Field(min_length=2, max_length=100_000)
    transfers: tuple[MeasuredTransfer, ...] = Field(default=(), max_length=100_000)
    step_overhead_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    block_size: Annotated[int, Field(ge=1, le=4096)] = 16
    kv_bytes_per_token: Annotated[int, Field(ge=1)]


def measured_link(profile: Profile, transport: str) -> LinkTable | None:
    """The hand-offs of one transport with all that belongs to them, by bytes; None when none was measured."""
    points = [(one.bytes, one.seconds) for one in profile.transfers if one.transport == transport]
    return LinkTable(points) if points else None


def read_profile(document: Mapping[str, Any], origin: str) -> Profile:
    """The profile in a JSON document; `origin` names it in errors. Raises ConfigError that names every
    fault."""
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}"
            for fault in error.errors(include_url=False)[:5]
        )
        raise ConfigError(f"{origin} is no profile of `tandem profile`: {faults}") from error
