"""Pure: a profile of a live pair of workers on one machine.

They share its memory bandwidth, and the router takes some of its cores: a step takes longer while the other
worker is busy. So the profile has every kind of point twice, alone and beside the other one at work.
"""

from typing import Annotated

from pydantic import Field

from planner.profile_file import MeasuredStep, MeasuredTransfer, Profile, Seconds
from planner.transfer_links import LinkTable, LinkTransfer

Points = Annotated[tuple[MeasuredStep, ...], Field(min_length=2, max_length=100_000)]
Transfers = Annotated[tuple[MeasuredTransfer, ...], Field(min_length=1, max_length=100_000)]


class LiveProfile(Profile):
    """A profile with the same kinds of points and transfers measured beside a busy other worker, too.

    `front_door_s` is what a request takes beside its queue and its step until the first token is with the
    client; `in_company_front_door_s` the same while the decode worker is busy.
    """

    in_company: Points
    in_company_transfers: Transfers
    front_door_s: Seconds
    in_company_front_door_s: Seconds


def company_profile(profile: LiveProfile) -> Profile:
    """What was measured beside the other worker, as a profile of its own."""
    return profile.model_copy(
        update={"points": profile.in_company, "transfers": profile.in_company_transfers}
    )


def transfer_model(profile: Profile) -> LinkTransfer:
    """The hand-offs of a profile with whole blocks, all inside one machine."""
    link = LinkTable((one.bytes, one.seconds) for one in profile.transfers)
    return LinkTransfer(profile.kv_bytes_per_token, profile.block_size, link, link)
