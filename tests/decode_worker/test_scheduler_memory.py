"""How much of the allocated KV memory holds no token, under a mixed load."""

import random
import statistics

from decode_worker.scheduler import DecodeLeg, DecodeScheduler, SampleStart
from engine.kv.blocks import BlockPool
from engine.step import SampledToken, StepPlan, StepResult
from tandem.ids import LegId
from tandem.sampling import SamplingParams

BLOCK_SIZE = 16


def chat_leg(number: int, rng: random.Random) -> DecodeLeg:
    """A turn of a chat: log-normal prompt (median 200 tokens) and output (median 120)."""
    prompt = min(3000, max(4, round(rng.lognormvariate(5.3, 0.9))))
    output = min(600, max(2, round(rng.lognormvariate(4.8, 0.7))))
    return DecodeLeg(
        leg_id=LegId(str(number)),
        token_ids=tuple(rng.randrange(1, 50_000) for _ in range(prompt)),
        prompt_tokens=prompt,
        samples=(SampleStart(0, (1,)),),
        params=SamplingParams(max_tokens=output),
        priority=0,
        deadline_s=1e9,
    )


def result_of(plan: StepPlan) -> StepResult:
    """The same token for every sequence."""
    requests = [request for part in plan.slices for request in part.samples]
    tokens = tuple(SampledToken(request.key, request.sample_index, 1, None) for request in requests)
    return StepResult(plan.step, tokens, 0.0)


def test_less_than_four_percent_of_the_allocated_slots_hold_no_token() -> None:
    rng = random.Random(20)
    pool = BlockPool(1024, BLOCK_SIZE)
    legs = DecodeScheduler(pool, max_batch=64, max_waiting=8, context_tokens=8192, eos_ids=(0,))
    wasted: list[float] = []
    added = preempted = 0
    while len(wasted) < 1500:
        while legs.load().waiting_legs < 4:
            legs.add(chat_leg(added, rng), 0.0)
            added += 1
        for reservation in legs.reserve(0.0):
            legs.landed(reservation.leg_id, 0.0)
        plan = legs.schedule(0.0)
        assert plan is not None
        slots = pool.allocated_blocks * BLOCK_SIZE
        tokens = sum(part.start + len(part.token_ids) for part in plan.slices)
        wasted.append((slots - tokens) / slots)
        preempted += len(legs.complete(result_of(plan), 0.0).dropped)
    assert added > 200
    assert preempted < added / 20
    assert statistics.mean(wasted) < 0.04
