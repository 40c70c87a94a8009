"""Pure: a profile of a live pair of workers on one machine.

They share its memory bandwidth, and the router takes some of its cores: a step takes longer while the other
worker is busy. So the profile has every point twice, alone and beside the other one at work.
"""

from typing import Annotated

from pydantic import Field, ValidationError

from planner.profile_file import MeasuredStep, MeasuredTransfer, Profile, Seconds
from planner.transfer_links import LinkTable, LinkTransfer
from tandem.errors import ConfigError

Points = Annotated[tuple[MeasuredStep, ...], Field(min_length=2, max_length=100_000)]
Transfers = Annotated[tuple[MeasuredTransfer, ...], Field(min_length=1, max_length=100_000)]


class LiveProfile(Profile):
    """A profile with the same points and transfers, in the same order, measured beside a busy other worker.

    `front_door_s` is what a request takes beside its queue and its step until the first token is with the
    client; `in_company_front_door_s` the same while the decode worker is busy.
    """

    in_company: Points
    in_company_transfers: Transfers
    front_door_s: Seconds
    in_company_front_door_s: Seconds


def read_live_profile(text: str | bytes, origin: str) -> LiveProfile:
    """Raises ConfigError when it is none, or its two sets of points differ in shape."""
    try:
        profile = LiveProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ConfigError(f"{origin} is no live profile: {where}: {first['msg']}") from error
    alone = ([one.shape for one in profile.points], [one.bytes for one in profile.transfers])
    company = ([one.shape for one in profile.in_company], [one.bytes for one in profile.in_company_transfers])
    if alone != company:
        raise ConfigError(f"{origin}: the points alone and in company must be of the same shapes")
    return profile


def company_profile(profile: LiveProfile) -> Profile:
    """What was measured beside the other worker, as a profile of its own."""
    return profile.model_copy(
        update={"points": profile.in_company, "transfers": profile.in_company_transfers}
    )


def transfer_model(profile: Profile) -> LinkTransfer:
    """The hand-offs of a profile with whole blocks, all inside one machine."""
    link = LinkTable((one.bytes, one.seconds) for one in profile.transfers)
    return LinkTransfer(profile.kv_bytes_per_token, profile.block_size, link, link)
