"""The step loop runs plans one at a time, wakes for work and deadlines, and stops where a step fails."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from decode_worker.pipelined_scheduler import PipelinedScheduler
from decode_worker.scheduler import DecodeLeg, DecodeOutcome, DecodeScheduler, SampleStart
from engine.contract import LayerListener
from engine.kv.blocks import BlockPool
from engine.leg import DroppedLeg, DropReason
from engine.step import StepPlan, StepResult
from engine.step_loop import StepLoop
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tests.engine.toy_runner import ToyRunner, toy_output

VOCABULARY = 97
PROMPT = tuple(range(5, 15))


class Bench:
    """A decode scheduler and its loop over a toy runner, on the real clock."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.runner = ToyRunner(64, 4, VOCABULARY)
        self.scheduler = self.decode_scheduler()
        self.tokens: list[int] = []
        self.dropped: list[DroppedLeg] = []
        self.ended = asyncio.Event()
        self.loop = StepLoop(
            self.scheduler, self.runner, thread, time.monotonic, self._outcome, self._expired
        )

    def decode_scheduler(self) -> DecodeScheduler:
        """The scheduler whose plans are run."""
        return DecodeScheduler(BlockPool(64, 4), max_batch=8, max_waiting=8, context_tokens=128, eos_ids=())

    def start(self, deadline_s: float, max_tokens: int) -> None:
        """Puts a leg whose KV has landed into the batch."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        first = toy_output(PROMPT, 0, 1, VOCABULARY)[0]
        starts = (SampleStart(0, (first,)),)
        leg = DecodeLeg(LegId("leg"), PROMPT, len(PROMPT), starts, params, 0, deadline_s)
        self.scheduler.add(leg, time.monotonic())
        (reservation,) = self.scheduler.reserve(time.monotonic())
        self.runner.pull(PROMPT, reservation.target_blocks, reservation.first_block)
        self.scheduler.landed(leg.leg_id, time.monotonic())
        self.loop.wake()

    def _outcome(self, _plan: StepPlan, _result: StepResult, outcome: DecodeOutcome) -> None:
        self.tokens += [token.token_id for token in outcome.tokens]
        if any(token.finish for token in outcome.tokens):
            self.ended.set()

    def _expired(self, dropped: tuple[DroppedLeg, ...]) -> None:
        self.dropped += dropped
        self.ended.set()


async def test_work_that_comes_while_it_sleeps_is_run_to_its_end() -> None:
    with ThreadPoolExecutor(1) as thread:
        bench = Bench(thread)
        began_s = time.monotonic()
        running = asyncio.create_task(bench.loop.run())
        await asyncio.sleep(0)
        bench.start(time.monotonic() + 60.0, max_tokens=12)
        async with asyncio.timeout(10.0):
            await bench.ended.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert bench.tokens == toy_output(PROMPT, 0, 12, VOCABULARY)[1:]
    assert bench.loop.steps == 11
    assert bench.loop.stalled_s() == 0.0
    assert 0.0 < bench.loop.busy_s() < time.monotonic() - began_s
    assert bench.scheduler.load().allocated_blocks == 0


class PipelinedBench(Bench):
    """A bench whose scheduler plans a step while one is in flight."""

    def decode_scheduler(self) -> DecodeScheduler:
        return PipelinedScheduler(
            BlockPool(64, 4), max_batch=8, max_waiting=8, context_tokens=128, eos_ids=()
        )


async def test_a_step_is_begun_before_the_result_of_the_one_before_is_taken() -> None:
    with ThreadPoolExecutor(1) as thread:
        bench = PipelinedBench(thread)
        running = asyncio.create_task(bench.loop.run())
        bench.start(time.monotonic() + 60.0, max_tokens=12)
        async with asyncio.timeout(10.0):
            await bench.ended.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert bench.tokens == toy_output(PROMPT, 0, 12, VOCABULARY)[1:]
    assert bench.loop.steps == 11
    assert bench.runner.most_in_flight == 2
    assert bench.scheduler.load().allocated_blocks == 0


async def test_a_deadline_wakes_it_though_nothing_else_happens() -> None:
    with ThreadPoolExecutor(1) as thread:
        bench = Bench(thread)
        params = SamplingParams(temperature=0.0, max_tokens=4)
        leg = DecodeLeg(
            LegId("late"), PROMPT, len(PROMPT), (SampleStart(0, (1,)),), params, 0, time.monotonic() + 0.05
        )
        bench.scheduler.add(leg, time.monotonic())
        running = asyncio.create_task(bench.loop.run())
        async with asyncio.timeout(10.0):
            await bench.ended.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [(drop.leg_id, drop.reason) for drop in bench.dropped] == [("late", DropReason.DEADLINE)]


async def test_layers_are_told_on_the_loop_and_before_the_steps_outcome() -> None:
    with ThreadPoolExecutor(1) as thread:
        bench = Bench(thread)
        said: list[tuple[str, int]] = []
        home = threading.get_ident()

        def scheduled(plan: StepPlan | None) -> LayerListener | None:
            return None if plan is None else lambda layers: said.append(("layers", threading.get_ident()))

        def outcome(plan: StepPlan, result: StepResult, outcome: DecodeOutcome) -> None:
            said.append(("outcome", threading.get_ident()))
            bench.ended.set()

        loop = StepLoop(
            bench.scheduler, bench.runner, thread, time.monotonic, outcome, bench._expired, scheduled
        )
        bench.start(time.monotonic() + 60.0, max_tokens=2)
        running = asyncio.create_task(loop.run())
        async with asyncio.timeout(10.0):
            await bench.ended.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert said == [("layers", home), ("outcome", home)]


async def test_a_step_that_fails_ends_the_loop_with_its_error() -> None:
    with ThreadPoolExecutor(1) as thread:
        bench = Bench(thread)
        bench.start(time.monotonic() + 60.0, max_tokens=4)
        # The KV is not where the plan says: the toy runner finds out and raises.
        bench.runner = ToyRunner(64, 4, VOCABULARY)
        broken = StepLoop(
            bench.scheduler, bench.runner, thread, time.monotonic, bench._outcome, bench._expired
        )
        with pytest.raises(AssertionError):
            await asyncio.wait_for(broken.run(), 10.0)
