"""Edge: decodes prompts with a runner and the decode worker's scheduler, without event loop or network."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from decode_worker.decode_leg import DecodeLeg, SampleStart
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation import Speculation
from engine.contract import StepRunner
from engine.kv.blocks import BlockPool
from engine.leg import LegToken
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.errors import TandemError
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams

_PROMPT_TOKENS_A_STEP = 512


@dataclass(frozen=True, slots=True)
class Decoded:
    """What came of some prompts: their outputs, and the decoding's steps and seconds (prompts not counted).

    `tokens` are all but the first of each output, as the steps gave them. `guesses` were verified and
    `accepted` of them held.
    """

    outputs: tuple[tuple[int, ...], ...]
    tokens: tuple[LegToken, ...]
    steps: int
    seconds: float
    guesses: int
    accepted: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second, of all sequences together."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def decode_alone(
    runner: StepRunner,
    pool: BlockPool,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    context_tokens: int,
    eos_ids: Collection[int] = (),
    speculation: Speculation | None = None,
    first_seed: int | None = None,
) -> Decoded:
    """Reads the prompts one by one, then writes all outputs in one batch; frees all blocks at the end.

    `first_seed` gives prompt i the seed first_seed + i. Raises TandemError when the batch does not fit into
    the pool.
    """
    legs = DecodeScheduler(
        pool,
        max_batch=len(prompts),
        max_waiting=len(prompts),
        context_tokens=context_tokens,
        eos_ids=eos_ids,
        speculation=speculation,
    )
    firsts: list[int] = []
    for place, prompt in enumerate(prompts):
        own = params if first_seed is None else replace(params, seed=first_seed + place)
        firsts.append(_read(runner, pool, legs, place, prompt, own))
    return _write(runner, legs, firsts)


def _read(
    runner: StepRunner,
    pool: BlockPool,
    legs: DecodeScheduler,
    place: int,
    prompt: Sequence[int],
    params: SamplingParams,
) -> int:
    """Puts a prompt into the batch, its KV handed over by copying blocks; returns its first token."""
    table = pool.allocate(pool.blocks_for(len(prompt)))
    first = _prefill(runner, prompt, table, params)
    leg_id = LegId(str(place))
    starts = (SampleStart(0, (first,)),)
    legs.add(DecodeLeg(leg_id, tuple(prompt), len(prompt), starts, params, 0, float("inf")), 0.0)
    reservations = legs.reserve(0.0)
    if not reservations:
        raise TandemError(f"A pool of {pool.num_blocks} blocks is too small for these prompts.")
    (reservation,) = reservations
    copies = tuple(zip(table[reservation.first_block :], reservation.target_blocks, strict=True))
    runner.run(StepPlan(0, (), copies))
    legs.landed(leg_id, 0.0)
    pool.release(table)
    return first


def _prefill(
    runner: StepRunner, prompt: Sequence[int], table: Sequence[BlockId], params: SamplingParams
) -> int:
    for start in range(0, len(prompt), _PROMPT_TOKENS_A_STEP):
        part = prompt[start : start + _PROMPT_TOKENS_A_STEP]
        last = start + len(part) == len(prompt)
        history = tuple(prompt) if params.needs_history else ()
        request = SampleRequest(0, 0, 0, params, history, len(prompt))
        result = runner.run(StepPlan(0, (SequenceSlice(part, start, table, (request,) if last else ()),)))
    return result.tokens[0].token_id


def _write(runner: StepRunner, legs: DecodeScheduler, firsts: Sequence[int]) -> Decoded:
    tokens: list[LegToken] = []
    steps = guesses = accepted = 0
    began_s = time.perf_counter()
    while (plan := legs.schedule(0.0)) is not None:
        outcome = legs.complete(runner.run(plan), 0.0)
        if outcome.dropped:
            raise TandemError(f"A sample was dropped: {outcome.dropped[0].message}.")
        tokens += outcome.tokens
        steps += 1
        guesses += outcome.guesses
        accepted += outcome.accepted
    seconds = time.perf_counter() - began_s
    outputs = tuple(
        (first, *(token.token_id for token in tokens if token.leg_id == str(place)))
        for place, first in enumerate(firsts)
    )
    return Decoded(outputs, tuple(tokens), steps, seconds, guesses, accepted)
