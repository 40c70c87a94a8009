"""Pure: a profile of a live pair of workers on one machine.

They share its memory bandwidth, so a step takes longer beside a step of the other worker, and more so
beside one that reads all weights for few tokens. So prompts and decode steps are measured alone, and beside
the other worker at work in several ways. A hand-off is work of both workers' own: it holds up the steps
under way.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from planner.step_times.profile_file import MeasuredStep, MeasuredTransfer, Profile, Seconds
from planner.step_times.transfer_links import LinkTable, LinkTransfer

Points = Annotated[tuple[MeasuredStep, ...], Field(min_length=2, max_length=100_000)]
Transfers = Annotated[tuple[MeasuredTransfer, ...], Field(min_length=1, max_length=100_000)]
Size = Annotated[int, Field(ge=1, le=1_000_000)]
Cost = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]


class Company(BaseModel):
    """What was measured beside the other worker at work in one way.

    Its decode points are beside steps that each read a prompt of `prompt_tokens`; its prompts, their
    transfers and `front_door_s` are beside decode steps of `decode_batch` sequences.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt_tokens: Size
    decode_batch: Size
    points: Points
    transfers: Transfers
    front_door_s: Seconds


class LiveProfile(Profile):
    """A profile with what company costs; `company` ascends in both sizes.

    `front_door_s` is what a request takes beside its queue and its step until the first token is with the
    client. `join_s` is from the router's news of landed KV to the first decode step, beyond that step's
    usual time. `handoff_prefill_s` and `handoff_decode_s` are what a hand-off adds to a step of either
    worker that is under way. `prefill_unrest_s` and `decode_unrest_s` are what a step takes longer in a mixed
    load (planner/forecast/live_rehearsal.py).
    """

    transfers: Transfers
    front_door_s: Seconds
    company: Annotated[tuple[Company, ...], Field(min_length=1, max_length=16)]
    join_s: Cost
    handoff_prefill_s: Cost
    handoff_decode_s: Cost
    prefill_unrest_s: Cost
    decode_unrest_s: Cost


def beside(profile: LiveProfile, company: Company) -> Profile:
    """What was measured in one company, as a profile of its own."""
    return profile.model_copy(update={"points": company.points, "transfers": company.transfers})


def transfer_model(profile: Profile) -> LinkTransfer:
    """The hand-offs of a profile with whole blocks, all inside one machine."""
    link = LinkTable((one.bytes, one.seconds) for one in profile.transfers)
    return LinkTransfer(profile.kv_bytes_per_token, profile.block_size, link, link)
