"""Pure: FastServe's skip-join multi-level feedback queues, as a batching policy of a colocated worker.

A queue's quantum is twice that of the one above. A job joins the highest queue whose quantum covers its first
iteration, which its prompt's length tells; it sinks when its quantum is used up, and rises to the top when it
has waited too long. Preempted jobs keep their KV; when blocks run out, those that will wait longest lose
theirs and are read again (FastServe swaps them to host memory instead).
"""

from collections.abc import Sequence

from engine.leg_bounds import check_pool, check_queue
from planner.latency import PromptPart
from planner.simulation.batching import Batch, Drawn, Job, Limits
from tandem.ids import LegId

FIRST_QUANTUM_TOKENS = 64
"""Tokens that a job of the top queue may be read and drawn before it sinks."""
QUEUES = 10
STARVED_STEPS = 2000
"""Steps without a turn after which a job rises to the top."""


class SkipJoinQueues:
    """mlfq: each step serves the highest jobs in order, as many as the limits allow."""

    tells_all = True

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = limits.pool_blocks
        self._jobs: dict[LegId, Job] = {}
        self._queues: list[dict[LegId, Job]] = [{} for _ in range(QUEUES)]
        self._level: dict[LegId, int] = {}
        self._used: dict[LegId, int] = {}
        self._served: dict[LegId, int] = {}
        self._steps = 0
        self._numbers = 0
        self._flying: list[tuple[Job, int]] = []

    @property
    def backlog(self) -> tuple[int, int, int]:
        """See BatchPolicy."""
        jobs = self._jobs.values()
        waiting = sum(job.blocks == 0 for job in jobs)
        tokens = sum([job.tokens - job.computed for job in jobs if job.computed < job.tokens - 1])
        return tokens, waiting, len(self._jobs) - waiting

    @property
    def free_blocks(self) -> int:
        """See BatchPolicy."""
        return self._free

    def add(self, leg_id: LegId, tokens: int, left: int) -> None:
        """See BatchPolicy."""
        check_pool(tokens + left, self._limits.pool_tokens)
        check_queue(len(self._jobs), self._limits.max_waiting)
        self._numbers += 1
        self._jobs[leg_id] = Job(leg_id, tokens, left, self._numbers)
        level = 0
        while level < QUEUES - 1 and quantum_tokens(level) < tokens:
            level += 1
        self._place(leg_id, level)
        self._served[leg_id] = self._steps

    def cancel(self, leg_id: LegId) -> None:
        """See BatchPolicy."""
        if leg_id in self._jobs:
            self._forget(self._jobs[leg_id])

    def begin(self) -> Batch | None:
        """See BatchPolicy."""
        self._raise_starved()
        order = [job for queue in self._queues for job in queue.values()]
        preempted: list[LegId] = []
        budget = self._limits.token_budget
        self._flying = []
        for place, job in enumerate(order):
            if budget <= 0 or len(self._flying) >= self._limits.max_batch:
                break
            tokens = job.tokens - job.computed
            if tokens > budget and self._flying:
                break
            if not self._has_blocks(job, order[place + 1 :], preempted):
                break
            self._flying.append((job, tokens))
            budget -= tokens
        parts = tuple([PromptPart(tokens, job.computed) for job, tokens in self._flying if tokens > 1])
        contexts = [job.tokens for job, tokens in self._flying if tokens == 1]
        if not self._flying:
            return None
        return Batch(parts, len(contexts), sum(contexts), 1, tuple(preempted))

    def complete(self, steps: int) -> Sequence[Drawn]:
        """See BatchPolicy."""
        self._steps += 1
        told: list[Drawn] = []
        flying, self._flying = self._flying, []
        for job, tokens in flying:
            if job.leg_id not in self._jobs:
                continue
            job.computed = job.tokens
            job.tokens += 1
            job.drawn += 1
            job.left -= 1
            told.append(Drawn(job.leg_id, job.drawn, job.left == 0))
            if job.left == 0:
                self._forget(job)
            else:
                self._charge(job.leg_id, tokens)
        return told

    def drawn(self, leg_id: LegId) -> int:
        """See BatchPolicy."""
        return self._jobs[leg_id].drawn

    def _has_blocks(self, job: Job, later: Sequence[Job], preempted: list[LegId]) -> bool:
        """Gives the job the blocks of its next step, at the cost of the jobs that will wait longest."""
        missing = -(-job.tokens // self._limits.block_size) - job.blocks
        for victim in reversed(later):
            if missing <= self._free:
                break
            if victim.blocks:
                self._free += victim.blocks
                victim.blocks = victim.computed = 0
                preempted.append(victim.leg_id)
        if missing > self._free:
            return False
        self._free -= missing
        job.blocks += missing
        return True

    def _charge(self, leg_id: LegId, tokens: int) -> None:
        """Uses up the job's quantum; it sinks when nothing is left of it."""
        self._served[leg_id] = self._steps
        self._used[leg_id] += tokens
        level = self._level[leg_id]
        if self._used[leg_id] >= quantum_tokens(level) and level < QUEUES - 1:
            self._place(leg_id, level + 1)

    def _raise_starved(self) -> None:
        limit = self._steps - STARVED_STEPS
        for leg_id in [leg_id for leg_id, step in self._served.items() if step < limit]:
            self._served[leg_id] = self._steps
            self._place(leg_id, 0)

    def _place(self, leg_id: LegId, level: int) -> None:
        known = self._level.get(leg_id)
        if known is not None:
            del self._queues[known][leg_id]
        self._level[leg_id] = level
        self._used[leg_id] = 0
        self._queues[level][leg_id] = self._jobs[leg_id]

    def _forget(self, job: Job) -> None:
        self._free += job.blocks
        leg_id = job.leg_id
        del self._queues[self._level.pop(leg_id)][leg_id]
        del self._jobs[leg_id], self._used[leg_id], self._served[leg_id]


def quantum_tokens(level: int) -> int:
    """Tokens that a job of a queue may use before it sinks."""
    quantum: int = FIRST_QUANTUM_TOKENS << level
    return quantum
