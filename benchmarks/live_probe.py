"""Edge: measures a live pair of workers through the front door: steps, hand-offs and what the door adds.

Steps are timed alone and beside the other worker at work: with short prompts and one sequence, whose steps
read all weights for few tokens, and with longer prompts and more sequences. The requests are the probe's
own, so that nothing is fitted to a load that is forecast later.
"""

import asyncio
import math
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.live_asker import LiveAsker, Stream
from benchmarks.live_costs import Alone, PromptTimes, Round, Window, profile_of, prompt_point, transfer
from planner.forecast.live_forecast import PairLimits
from planner.forecast.live_profile import Company, LiveProfile
from planner.forecast.live_rehearsal import SLO_CLASS, Rehearsed, rehearsed
from planner.latency import PromptPart, StepShape
from planner.step_times.profile_file import MeasuredStep
from planner.step_times.profile_model import ProfileModel
from planner.workloads.arrivals import ArrivalProcess, arrival_times_s
from planner.workloads.workload import SimRequest
from tandem.errors import TandemError
from tandem.worker import Role

BLOCK_TOKENS = 16
PROMPT_TOKENS = (3, 9, 21, 45, 93, 189, 381, 509)
"""No multiples of a matrix product's tiles, at which a step is faster than at the lengths between them."""

BATCHES = (1, 3, 8, 16)
CONTEXTS = (32, 192)
STEPS = 32
"""Steps that a batch is timed over."""

ROUNDS = 2
"""All is measured so often, minutes apart, since the pace of a shared machine drifts."""

WINDOWS, HANDOFF_STEPS = 3, 48
"""Stretches of a round over which hand-offs are timed, and their steps: some dozens of hand-offs."""


SHORT_PROMPT_TOKENS = 93
SHORT_RUNS = 2
"""Short prompts are asked this many times as often: their steps vary more, and cost less to repeat."""

REHEARSED = 120
REHEARSED_PROMPTS, REHEARSED_OUTPUTS = (4, 192), (2, 24)
REHEARSED_LOAD = 0.3
"""The rehearsal: requests with lengths even in their logarithm, and the busy share of the prefill worker."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """How the other worker is kept at work, and which batches are timed beside it."""

    prompt_tokens: int
    decode_batch: int
    batches: tuple[int, ...]


NEIGHBOURS = (Neighbour(12, 1, BATCHES), Neighbour(128, 8, (1, 3, 16)))
READERS = 2
"""Askers of prompts that want one token: while one is answered, the other's prompt is read."""

HANDOFF_READERS = 3
"""The same with a hand-off each, so that another prompt is being read when one is handed over."""


class LiveProbe:
    """Profiles the cluster of one asker, which must have met it."""

    def __init__(self, asker: LiveAsker, runs: int, limits: PairLimits) -> None:
        self._asker = asker
        self._runs = runs
        self._limits = limits

    async def profile(self) -> LiveProfile:
        """Measures everything; takes some minutes. Raises TandemError."""
        await self._asker.ask(PROMPT_TOKENS[-1], 4)
        rounds = [await self._round() for _ in range(ROUNDS)]
        profile = profile_of(rounds, BLOCK_TOKENS)
        return rehearsed(profile, await self._rehearsal(profile), self._limits)

    async def _round(self) -> Round:
        alone = await self._alone()
        company = [await self._beside(neighbour) for neighbour in NEIGHBOURS]
        windows = [await self._handoff_windows() for _ in range(WINDOWS)]
        return Round(alone, tuple(company), tuple(windows))

    async def _alone(self) -> Alone:
        prompts = [await self._prompt(tokens) for tokens in PROMPT_TOKENS]
        batches = [await self._batch(batch, context) for context in CONTEXTS for batch in BATCHES]
        return Alone(tuple(prompts), tuple(batches))

    async def _beside(self, neighbour: Neighbour) -> Company:
        async with self._asker.decoding(neighbour.decode_batch, BLOCK_TOKENS):
            prompts = [await self._prompt(tokens) for tokens in PROMPT_TOKENS]
        async with self._asker.reading(READERS, neighbour.prompt_tokens, 1):
            batches = [
                await self._batch(batch, context) for context in CONTEXTS for batch in neighbour.batches
            ]
        return Company(
            prompt_tokens=neighbour.prompt_tokens,
            decode_batch=neighbour.decode_batch,
            points=(*map(prompt_point, prompts), *batches),
            transfers=tuple(map(transfer, prompts)),
            front_door_s=statistics.median(one.door_s for one in prompts),
        )

    async def _prompt(self, tokens: int) -> PromptTimes:
        steps_s, doors_s, handoffs_s, gaps_s, moved = [], [], [], [], 0
        for _ in range(self._runs * (SHORT_RUNS if tokens <= SHORT_PROMPT_TOKENS else 1)):
            before = await self._asker.steps(Role.PREFILL)
            answer = await self._asker.ask(tokens, 3)
            after = await self._asker.steps(Role.PREFILL)
            if after.count <= before.count:
                raise TandemError("The prefill worker counted no step for a prompt.")
            steps_s.append(after.seconds - before.seconds)
            doors_s.append(answer.arrived_s[0] - answer.sent_s - steps_s[-1])
            handoffs_s.append(answer.timeline.handoff_s)
            gaps_s.append(answer.arrived_s[-1] - answer.arrived_s[0])
            moved = answer.timeline.handoff_bytes
        median = statistics.median
        return PromptTimes(
            tokens, median(steps_s), median(doors_s), median(handoffs_s), moved, median(gaps_s)
        )

    async def _batch(self, batch: int, context: int) -> MeasuredStep:
        """The median step while all sequences of a batch decode."""
        async with self._asker.decoding(batch, context) as streams:
            first = len(streams[0].arrived_s)
            await streams[0].reaches(first + STEPS)
            last = len(streams[0].arrived_s)
            # The streams are at the same step, some tokens apart by when they joined.
            contexts = sum(context + len(stream.arrived_s) - (last - first) // 2 for stream in streams)
            arrived_s = streams[0].arrived_s[first - 1 : last]
            return MeasuredStep(
                decode_batch=batch,
                decode_context_tokens=contexts,
                seconds=statistics.median(later - sooner for sooner, later in pairwise(arrived_s)),
                runs=last - first,
            )

    async def _handoff_windows(self) -> tuple[Window, Window]:
        """The pace of both workers without hand-offs and with them."""
        async with self._asker.decoding(1, BLOCK_TOKENS) as (stream,):
            without = await self._window(stream, READERS, 1)
            handing = await self._window(stream, HANDOFF_READERS, 2)
        return without, handing

    async def _window(self, stream: Stream, askers: int, output_tokens: int) -> Window:
        async with self._asker.reading(askers, NEIGHBOURS[0].prompt_tokens, output_tokens) as readers:
            await stream.reaches(len(stream.arrived_s) + 4)
            begun = await self._asker.steps(Role.PREFILL)
            answers, first = readers.answers, len(stream.arrived_s)
            await stream.reaches(first + HANDOFF_STEPS)
            answers, last = readers.answers - answers, len(stream.arrived_s)
            ended = await self._asker.steps(Role.PREFILL)
            return Window(
                seconds=stream.arrived_s[last - 1] - stream.arrived_s[first - 1],
                decode_steps=last - first,
                context_tokens=BLOCK_TOKENS + (first + last) // 2,
                prompt_tokens=NEIGHBOURS[0].prompt_tokens,
                prefill_s=ended.seconds - begun.seconds,
                prefill_steps=ended.count - begun.count,
                answers=answers,
            )

    async def _rehearsal(self, profile: LiveProfile) -> list[Rehearsed]:
        """A mixed load, open loop."""
        asked = _rehearsal_requests(ProfileModel(profile))
        start_s = time.perf_counter()

        async def one(request: SimRequest) -> Rehearsed:
            due_s = start_s + request.at_s
            await asyncio.sleep(due_s - time.perf_counter())
            answer = await self._asker.ask(request.prompt_tokens, request.output_tokens)
            first_s, last_s = answer.arrived_s[0], answer.arrived_s[-1]
            return Rehearsed(request, first_s - due_s, (last_s - first_s) / (request.output_tokens - 1))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in asked]
        return [task.result() for task in tasks]


def _rehearsal_requests(model: ProfileModel) -> list[SimRequest]:
    """Poisson arrivals at the rate that keeps the prefill worker busy for the share wanted."""
    draws = random.Random(REHEARSED)
    lengths = [
        (_even_in_logarithm(draws, *REHEARSED_PROMPTS), _even_in_logarithm(draws, *REHEARSED_OUTPUTS))
        for _ in range(REHEARSED)
    ]
    reading_s = sum(model.step_s(StepShape((PromptPart(prompt),))) for prompt, _ in lengths)
    times_s = arrival_times_s(ArrivalProcess.POISSON, REHEARSED_LOAD * REHEARSED / reading_s, draws)
    return [
        SimRequest(number, at_s, prompt, output, SLO_CLASS)
        for number, ((prompt, output), at_s) in enumerate(zip(lengths, times_s, strict=False))
    ]


def _even_in_logarithm(draws: random.Random, least: int, most: int) -> int:
    return round(math.exp(draws.uniform(math.log(least), math.log(most))))
