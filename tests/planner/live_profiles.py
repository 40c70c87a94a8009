"""A live profile with round numbers."""

from planner.forecast.live_profile import Company, LiveProfile
from planner.step_times.profile_file import MeasuredStep, MeasuredTransfer

SHORT, LONG = 10, 1000
"""Prompts of the two companies."""


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


def company(prompt_tokens: int, batch: int, slower: float, transfer_s: float, door_s: float) -> Company:
    """Everything takes `slower` times as long beside such steps."""
    return Company(
        prompt_tokens=prompt_tokens,
        decode_batch=batch,
        points=points(slower),
        transfers=transfers(transfer_s),
        front_door_s=door_s,
    )


def live_profile(
    slower: float = 2.0,
    slower_beside_long: float | None = None,
    door_s: float = 0.005,
    company_transfer_s: float = 0.03,
    handoff_prefill_s: float = 0.0,
    handoff_decode_s: float = 0.0,
    join_s: float = 0.0,
) -> LiveProfile:
    """Everything takes `slower` times as long in company; beside a long prompt another factor, if given."""
    beside_long = slower if slower_beside_long is None else slower_beside_long
    return LiveProfile(
        version=1,
        kind="tandem profile",
        points=points(1.0),
        transfers=transfers(0.01),
        kv_bytes_per_token=100,
        front_door_s=door_s,
        company=(
            company(SHORT, 1, slower, company_transfer_s, door_s),
            company(LONG, 16, beside_long, company_transfer_s, door_s),
        ),
        join_s=join_s,
        handoff_prefill_s=handoff_prefill_s,
        handoff_decode_s=handoff_decode_s,
        prefill_unrest_s=0.0,
        decode_unrest_s=0.0,
    )
