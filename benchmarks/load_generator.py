"""Edge: offers a planned load, open loop: requests go out when due, whatever became of those before."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing

from benchmarks.latency_summary import Outcome, OutcomeKind, TokenArrival
from benchmarks.targets import Target
from benchmarks.workload import PlannedRequest
from tandem.errors import DeadlineExceeded, Overloaded, TandemError

TIMEOUT_MARGIN_S = 1.0
"""How much longer than the target's own timeout a request may take before it is given up here."""


async def offer(
    requests: Sequence[PlannedRequest],
    target: Target,
    timeout_s: float,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> tuple[Outcome, ...]:
    """Sends every request at its time, each bounded by the timeout; gives the outcomes in planned order."""
    start_s = time.perf_counter()

    async def one(request: PlannedRequest) -> Outcome:
        outcome = await _ask(request, target, timeout_s, start_s + request.at_s)
        on_outcome(outcome)
        return outcome

    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for request in sorted(requests, key=lambda planned: planned.at_s):
            await asyncio.sleep(start_s + request.at_s - time.perf_counter())
            tasks.append(group.create_task(one(request)))
    return tuple(task.result() for task in tasks)


async def _ask(request: PlannedRequest, target: Target, timeout_s: float, due_s: float) -> Outcome:
    sent_s = time.perf_counter()
    arrivals: list[TokenArrival] = []
    kind, detail = OutcomeKind.COMPLETED, ""

    def record(tokens: int) -> None:
        arrivals.append(TokenArrival(time.perf_counter(), tokens))

    try:
        async with (
            asyncio.timeout(timeout_s + TIMEOUT_MARGIN_S),
            aclosing(target.tokens(request, timeout_s)) as counts,
        ):
            async for count in counts:
                record(count)
        if not arrivals:
            kind, detail = OutcomeKind.FAILED, "The stream ended without a token."
    except Overloaded as error:
        kind, detail = OutcomeKind.REJECTED, str(error)
    except (DeadlineExceeded, TimeoutError) as error:
        kind, detail = OutcomeKind.TIMED_OUT, str(error)
    except TandemError as error:
        kind, detail = OutcomeKind.FAILED, str(error)
    return Outcome(
        kind,
        request.slo_class,
        due_s,
        sent_s,
        time.perf_counter(),
        len(request.token_ids),
        tuple(arrivals),
        detail,
    )
