"""Pure: batching policies of a worker that reads prompts and writes tokens on the same blocks, by name.

- prefill_first: prompts go before decoding, unsplit, up to the token budget (vLLM before chunked prefill)
- sarathi: every step decodes all, and fills the token budget with chunks of prompts (Sarathi-Serve)
- mlfq: skip-join multi-level feedback queues (planner/simulation/mlfq.py; FastServe)

Blocks are counted. A sequence that loses its blocks is read again, prompt and tokens so far.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.kv.length_sums import LengthSums
from engine.leg_bounds import check_pool, check_queue
from planner.latency import PromptPart
from tandem.ids import LegId


@dataclass(frozen=True, slots=True)
class Limits:
    """A colocated worker's limits, as in WorkerSpec."""

    pool_blocks: int
    block_size: int
    token_budget: int
    max_batch: int
    max_waiting: int

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.pool_blocks * self.block_size


@dataclass(slots=True, eq=False)
class Job:
    """A leg: `tokens` to read before the next token is drawn, `left` tokens to draw, `drawn` here so far.

    `computed` of them have their KV, in `blocks` blocks.
    """

    leg_id: LegId
    tokens: int
    left: int
    number: int = 0
    drawn: int = 0
    computed: int = 0
    blocks: int = 0
    joined_clock: int = -1
    """Clock at which it joined the decoding batch; -1 while it is not in it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a worker does next: prompt parts and one token of each of `decode_batch` sequences.

    `steps` such steps may follow each other (1 with prompt parts). `preempted` legs lost their blocks.
    """

    prompts: tuple[PromptPart, ...]
    decode_batch: int
    decode_context_tokens: int
    steps: int = 1
    preempted: tuple[LegId, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A leg drew its `count`th token of this stay; told of the first after reading and of the last."""

    leg_id: LegId
    count: int
    ended: bool


class BatchPolicy(Protocol):
    """Decides what a colocated worker does in each step. begin and complete alternate."""

    tells_all: bool
    """Whether complete tells of every token, not of first and last ones only."""

    def add(self, leg_id: LegId, tokens: int, left: int) -> None:
        """Queues a leg. Raises PromptTooLong if it can never fit, Overloaded if the queue is full."""
        ...

    def cancel(self, leg_id: LegId) -> None:
        """Forgets a leg between steps; unknown ones are ignored."""
        ...

    def begin(self) -> Batch | None:
        """The next step or run of steps; None when there is nothing to do."""
        ...

    def complete(self, steps: int) -> Sequence[Drawn]:
        """So many steps of the batch begun are over (at most those it has)."""
        ...

    def drawn(self, leg_id: LegId) -> int:
        """Tokens that a leg drew here."""
        ...

    @property
    def backlog(self) -> tuple[int, int, int]:
        """Prompt tokens not read, legs not started, legs started."""
        ...

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        ...


class Colocated:
    """prefill_first and sarathi: prompts in order of arrival, decoding in one batch kept as sums."""

    tells_all = False

    def __init__(self, limits: Limits, *, chunked: bool) -> None:
        self._limits = limits
        self._chunked = chunked
        self._free = limits.pool_blocks
        self._jobs: dict[LegId, Job] = {}
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._sums = LengthSums(limits.block_size)
        self._ends: list[tuple[int, int, Job]] = []
        self._numbers = 0
        self._flying: list[tuple[Job, int]] = []
        self._decodes = False

    @property
    def backlog(self) -> tuple[int, int, int]:
        """See BatchPolicy."""
        ahead = [*self._waiting, *self._reading]
        tokens = sum([job.tokens - job.computed for job in ahead])
        return tokens, len(self._waiting), len(self._reading) + self._sums.count

    @property
    def free_blocks(self) -> int:
        """See BatchPolicy."""
        return self._free

    def add(self, leg_id: LegId, tokens: int, left: int) -> None:
        """See BatchPolicy."""
        check_pool(tokens + left, self._limits.pool_tokens)
        check_queue(len(self._waiting), self._limits.max_waiting)
        self._numbers += 1
        job = self._jobs[leg_id] = Job(leg_id, tokens, left, self._numbers)
        self._waiting.append(job)

    def cancel(self, leg_id: LegId) -> None:
        """See BatchPolicy."""
        job = self._jobs.pop(leg_id, None)
        if job is None:
            return
        if job.joined_clock >= 0:
            self._leave(job)
        elif job in self._reading:
            self._reading.remove(job)
            self._free += job.blocks
        else:
            self._waiting.remove(job)

    def begin(self) -> Batch | None:
        """See BatchPolicy."""
        preempted = self._make_room()
        decodes = self._sums.count
        budget = self._limits.token_budget - (decodes if self._chunked else 0)
        self._read(budget, keep_free=self._sums.growth_next())
        self._decodes = decodes > 0 and (self._chunked or not self._flying)
        parts = tuple([PromptPart(tokens, job.computed) for job, tokens in self._flying])
        if not self._decodes:
            return Batch(parts, 0, 0, 1, preempted) if parts else None
        steps = 1
        if not parts and not self._waiting:
            steps = self._sums.steps_with_blocks(self._free, self._steps_to_end())
        return Batch(parts, decodes, self._sums.context_tokens, steps, preempted)

    def complete(self, steps: int) -> Sequence[Drawn]:
        """See BatchPolicy."""
        told: list[Drawn] = []
        if self._decodes:
            self._free -= self._sums.growth(steps)
            self._sums.take(steps)
            while self._ends and (job := self._next_end()) and job[0] == self._sums.clock:
                told.append(self._ended(heapq.heappop(self._ends)[2]))
        flying, self._flying = self._flying, []
        for reader, tokens in flying:
            reader.computed += tokens
            if reader.leg_id in self._jobs and reader.computed == reader.tokens:
                self._reading.remove(reader)
                told.append(self._joined(reader))
        return told

    def drawn(self, leg_id: LegId) -> int:
        """See BatchPolicy."""
        job = self._jobs[leg_id]
        return job.drawn + (self._sums.clock - job.joined_clock if job.joined_clock >= 0 else 0)

    def _read(self, budget: int, keep_free: int) -> None:
        """Puts prompts, or chunks of them, into the step that is being made."""
        self._flying = []
        for job in self._reading:
            tokens = min(budget, job.tokens - job.computed)
            if tokens > 0:
                self._flying.append((job, tokens))
                budget -= tokens
        while self._waiting and budget > 0:
            job = self._waiting[0]
            full = self._sums.count + len(self._reading) >= self._limits.max_batch
            blocks = -(-job.tokens // self._limits.block_size)
            if full or blocks + keep_free > self._free:
                break
            if not self._chunked and self._flying and job.tokens > budget:
                break
            self._waiting.popleft()
            self._reading.append(job)
            self._free -= blocks
            job.blocks = blocks
            tokens = min(budget, job.tokens) if self._chunked else job.tokens
            self._flying.append((job, tokens))
            budget -= tokens

    def _joined(self, job: Job) -> Drawn:
        """The prompt is read and a token drawn: the sequence joins the batch, unless that was its last."""
        job.drawn += 1
        job.left -= 1
        if job.left == 0:
            self._free += job.blocks
            del self._jobs[job.leg_id]
            return Drawn(job.leg_id, job.drawn, True)
        job.joined_clock = self._sums.clock
        self._sums.join(job.tokens)
        heapq.heappush(self._ends, (job.joined_clock + job.left, job.number, job))
        return Drawn(job.leg_id, job.drawn, False)

    def _ended(self, job: Job) -> Drawn:
        count = self.drawn(job.leg_id)
        self._leave(job)
        del self._jobs[job.leg_id]
        return Drawn(job.leg_id, count, True)

    def _leave(self, job: Job) -> None:
        """Takes a sequence out of the batch, and its blocks back."""
        steps = self._sums.clock - job.joined_clock
        computed = job.tokens + steps
        self._sums.leave(computed)
        self._free += -(-computed // self._limits.block_size)
        job.drawn += steps
        job.left -= steps
        job.tokens = computed + 1
        job.joined_clock = -1

    def _make_room(self) -> tuple[LegId, ...]:
        """The latest arrivals give their blocks back until the batch can make a step."""
        preempted: list[LegId] = []
        while self._sums.growth_next() > self._free and self._sums.count > 1:
            job = max(
                (job for job in self._jobs.values() if job.joined_clock >= 0), key=lambda job: job.number
            )
            self._leave(job)
            job.computed = 0
            self._waiting.appendleft(job)
            preempted.append(job.leg_id)
        return tuple(preempted)

    def _steps_to_end(self) -> int:
        end = self._next_end()
        return 1 if end is None else end[0] - self._sums.clock

    def _next_end(self) -> tuple[int, int, Job] | None:
        """The next end of a sequence that is still in the batch as it was."""
        while self._ends:
            end, _, job = self._ends[0]
            if job.joined_clock >= 0 and job.joined_clock + job.left == end:
                return self._ends[0]
            heapq.heappop(self._ends)
        return None
