"""A live profile with round numbers."""

from planner.live_profile import LiveProfile
from planner.profile_file import MeasuredStep, MeasuredTransfer


def points(slower: float) -> tuple[MeasuredStep, ...]:
    """A prompt token takes 1 ms, a decode step 20 ms, all `slower` times."""
    prompts = [MeasuredStep(prompts=((tokens, 0),), seconds=slower * tokens / 1000) for tokens in (10, 500)]
    decodes = [
        MeasuredStep(decode_batch=batch, decode_context_tokens=100 * batch, seconds=slower * 0.02)
        for batch in (1, 16)
    ]
    return (*prompts, *decodes)


def transfers(seconds: float) -> tuple[MeasuredTransfer, ...]:
    """One hand-off of 16 tokens."""
    return (MeasuredTransfer(transport="live", bytes=1600, seconds=seconds),)


def live_profile(slower: float = 2.0, door_s: float = 0.005) -> LiveProfile:
    """Everything takes `slower` times as long in company."""
    return LiveProfile(
        version=1,
        kind="tandem profile",
        points=points(1.0),
        transfers=transfers(0.01),
        kv_bytes_per_token=100,
        in_company=points(slower),
        in_company_transfers=transfers(0.03),
        front_door_s=door_s,
        in_company_front_door_s=door_s,
    )
