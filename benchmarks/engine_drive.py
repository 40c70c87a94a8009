"""Edge: drives the engine alone, without event loop or network, through both workers' schedulers."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decode_worker.decode_leg import DecodeLeg, SampleStart
from decode_worker.scheduler import DecodeScheduler
from engine.kv.blocks import BlockPool
from engine.leg import LegToken
from engine.loading import LoadedEngine
from engine.step import StepPlan, StepResult
from prefill_worker.scheduler import PrefillLeg, PrefillScheduler
from tandem.errors import TandemError
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams
from tandem.worker_config import WorkerConfig


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Durations of the steps of one run, in order: with the scheduler's work, and the runner's alone."""

    wall_s: tuple[float, ...]
    compute_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts whose KV is parked in the pool, each with its first token."""

    legs: tuple[PrefillLeg, ...]
    first_tokens: tuple[int, ...]
    blocks: tuple[tuple[BlockId, ...], ...]
    times: StepTimes


class EngineDrive:
    """One engine, its pool, and a scheduler of each role over the same blocks.

    KV is handed over by finding it in the prefix cache; a block that is not full is copied.
    """

    def __init__(self, engine: LoadedEngine, config: WorkerConfig, seed: int = 0) -> None:
        """`engine` must have been loaded with `config`; `seed` chooses the prompts."""
        self.engine = engine
        self._block_size = config.block_size
        self._random = random.Random(seed)
        self._numbers = 0
        self.pool = BlockPool(config.pool_blocks, config.block_size)
        self._prefill = PrefillScheduler(
            self.pool,
            token_budget=config.token_budget,
            max_waiting=config.max_waiting,
            context_tokens=engine.context_tokens,
            eos_ids=(),
        )
        self.decode = DecodeScheduler(
            self.pool,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            context_tokens=engine.context_tokens,
            eos_ids=(),
        )

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """A random prompt that no earlier one starts with."""
        return tuple(
            self._random.randrange(self.engine.model_config.vocabulary_tokens) for _ in range(tokens)
        )

    def read(self, prompts: Sequence[tuple[int, ...]], output_tokens: int = 2) -> ReadPrompts:
        """Prefills the prompts, which stay parked until `forget` or `write`."""
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        legs = tuple(
            PrefillLeg(self._leg_id(), prompt, len(prompt), (0,), params, 0, float("inf"))
            for prompt in prompts
        )
        for leg in legs:
            self._prefill.add(leg, time.perf_counter())
        first: dict[LegId, int] = {}
        blocks: dict[LegId, tuple[BlockId, ...]] = {}

        def complete(result: StepResult, now_s: float) -> None:
            outcome = self._prefill.complete(result, now_s)
            first.update({token.leg_id: token.token_id for token in outcome.tokens})
            blocks.update({offer.leg_id: offer.blocks for offer in outcome.offered})

        times = self._steps(self._prefill.schedule, complete)
        first_tokens = tuple(first[leg.leg_id] for leg in legs)
        return ReadPrompts(legs, first_tokens, tuple(blocks.get(leg.leg_id, ()) for leg in legs), times)

    def forget(self, read: ReadPrompts) -> None:
        """Frees parked prompts; what they left in the prefix cache stays."""
        for leg in read.legs:
            self._prefill.release(leg.leg_id)

    def join(self, read: ReadPrompts) -> None:
        """Moves parked prompts into the decode scheduler's batch. Raises TandemError when they don't fit."""
        now_s = time.perf_counter()
        for leg, token in zip(read.legs, read.first_tokens, strict=True):
            starts = (SampleStart(0, (token,)),)
            decoding = DecodeLeg(
                leg.leg_id, leg.token_ids, leg.prompt_tokens, starts, leg.params, 0, float("inf")
            )
            self.decode.add(decoding, now_s)
        parked = {leg.leg_id: blocks for leg, blocks in zip(read.legs, read.blocks, strict=True)}
        for reservation in self.decode.reserve(now_s):
            sources = parked[reservation.leg_id][reservation.first_block :]
            self.engine.cache.copy_blocks(zip(sources, reservation.target_blocks, strict=True))
            self.decode.landed(reservation.leg_id, now_s)
        if self.decode.load().waiting_legs:
            raise TandemError("The KV pool or the worker's limits are too small for this batch.")
        self.forget(read)

    def write(self, read: ReadPrompts, at_step: Callable[[int], None] | None = None) -> StepTimes:
        """Decodes all output tokens of parked prompts in one batch and frees the prompts.

        `at_step` is called after each step with the number of those done. Raises as `join` does.
        """
        return self._write(read, at_step)[0]

    def outputs(self, read: ReadPrompts) -> tuple[tuple[int, ...], ...]:
        """As `write`, but gives the output tokens of each prompt, the first ones included."""
        _, tokens = self._write(read, None)
        outputs = {leg.leg_id: [first] for leg, first in zip(read.legs, read.first_tokens, strict=True)}
        for token in tokens:
            outputs[token.leg_id].append(token.token_id)
        return tuple(tuple(outputs[leg.leg_id]) for leg in read.legs)

    def _write(
        self, read: ReadPrompts, at_step: Callable[[int], None] | None
    ) -> tuple[StepTimes, list[LegToken]]:
        self.join(read)
        return self.decode_joined(at_step)

    def decode_joined(self, at_step: Callable[[int], None] | None = None) -> tuple[StepTimes, list[LegToken]]:
        """Decodes all that joined to its end; `at_step` as in `write`. Raises TandemError for a full pool."""
        done = 0
        tokens: list[LegToken] = []

        def complete(result: StepResult, now_s: float) -> None:
            nonlocal done
            done += 1
            outcome = self.decode.complete(result, now_s)
            if outcome.dropped:
                raise TandemError("The KV pool is too small for this batch.")
            tokens.extend(outcome.tokens)
            if at_step is not None:
                at_step(done)

        return self._steps(self.decode.schedule, complete), tokens

    def _steps(
        self, schedule: Callable[[float], StepPlan | None], complete: Callable[[StepResult, float], None]
    ) -> StepTimes:
        wall_s, compute_s = [], []
        began_s = time.perf_counter()
        while (plan := schedule(began_s)) is not None:
            result = self.engine.runner.run(plan)
            complete(result, time.perf_counter())
            ended_s = time.perf_counter()
            wall_s.append(ended_s - began_s)
            compute_s.append(result.compute_s)
            began_s = ended_s
        return StepTimes(tuple(wall_s), tuple(compute_s))

    def _leg_id(self) -> LegId:
        self._numbers += 1
        return LegId(f"bench-{self._numbers}")
