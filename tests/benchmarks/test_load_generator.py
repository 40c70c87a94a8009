"""Edge: the load generator is open loop and bounded, whatever the target does."""

import asyncio
import time
from collections.abc import AsyncGenerator

from benchmarks.latency_summary import Outcome, OutcomeKind
from benchmarks.load_generator import offer
from benchmarks.workload import PlannedRequest
from tandem.errors import DeadlineExceeded, NotReady, Overloaded


class SlowTarget:
    """Answers each request by its first token id: seconds to wait, or a way to fail."""

    OVERLOADED, BROKEN, LATE, HANGING, SILENT = 1000, 1001, 1002, 1003, 1004

    def __init__(self) -> None:
        self.started_s: list[float] = []

    async def tokens(self, request: PlannedRequest, timeout_s: float) -> AsyncGenerator[int, None]:
        """See benchmarks.targets.Target."""
        self.started_s.append(time.perf_counter())
        match request.token_ids[0]:
            case self.OVERLOADED:
                raise Overloaded("full", 1.0)
            case self.BROKEN:
                yield 1
                raise NotReady("gone")
            case self.LATE:
                raise DeadlineExceeded("late")
            case self.HANGING:
                await asyncio.sleep(3600)
            case self.SILENT:
                return
            case tenths:
                await asyncio.sleep(tenths / 10)
                yield 2
                yield 1

    async def close(self) -> None:
        """Nothing to close."""


def request(at_s: float, behaviour: int) -> PlannedRequest:
    return PlannedRequest(at_s, (behaviour,), 3, "a")


async def test_requests_go_out_when_due_although_earlier_ones_still_run() -> None:
    target = SlowTarget()
    before_s = time.perf_counter()
    outcomes = await offer([request(0.0, 5), request(0.1, 5), request(0.2, 5)], target, timeout_s=5.0)
    sent_s = [moment - before_s for moment in target.started_s]
    assert sent_s[2] < 0.45
    assert [round(outcome.due_s - outcomes[0].due_s, 3) for outcome in outcomes] == [0.0, 0.1, 0.2]
    assert all(outcome.ttft_s is not None and outcome.ttft_s >= 0.5 for outcome in outcomes)
    assert [outcome.output_tokens for outcome in outcomes] == [3, 3, 3]


async def test_every_way_to_fail_is_counted_and_stops_nobody_else() -> None:
    kinds: list[OutcomeKind] = []
    requests = [
        request(0.0, SlowTarget.OVERLOADED),
        request(0.0, SlowTarget.BROKEN),
        request(0.0, SlowTarget.LATE),
        request(0.0, SlowTarget.SILENT),
        request(0.01, 0),
    ]

    def note(outcome: Outcome) -> None:
        kinds.append(outcome.kind)

    outcomes = await offer(requests, SlowTarget(), 5.0, note)
    assert [outcome.kind for outcome in outcomes] == [
        OutcomeKind.REJECTED,
        OutcomeKind.FAILED,
        OutcomeKind.TIMED_OUT,
        OutcomeKind.FAILED,
        OutcomeKind.COMPLETED,
    ]
    assert outcomes[1].output_tokens == 1
    assert len(kinds) == len(requests)


async def test_target_that_hangs_is_given_up() -> None:
    started_s = time.perf_counter()
    (outcome,) = await offer([request(0.0, SlowTarget.HANGING)], SlowTarget(), timeout_s=0.1)
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert time.perf_counter() - started_s < 3.0
