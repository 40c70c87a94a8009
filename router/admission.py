"""Pure: who may come in, and in which order the waiting legs get a prefill worker."""

import heapq
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from tandem.errors import InvalidRequest, Overloaded, PromptTooLong
from tandem.sampling import SamplingParams

RATE_WINDOW_S = 10.0
LONGEST_RETRY_S = 60.0


def fit_context(
    prompt_tokens: int, params: SamplingParams, context_tokens: int, field: str = "prompt"
) -> SamplingParams:
    """The parameters with max_tokens filled in: up to the context length when it was not given.

    Raises PromptTooLong when prompt and output can't fit the context length.
    """
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if prompt_tokens + wanted > context_tokens:
        asked = (
            f"the prompt has {prompt_tokens} tokens and at least one more is needed"
            if params.max_tokens is None
            else f"{prompt_tokens + wanted} tokens were requested "
            f"({prompt_tokens} in the prompt, {wanted} for the output)"
        )
        raise PromptTooLong(f"The model's context length is {context_tokens} tokens, but {asked}.", field)
    if params.max_tokens is not None:
        return params
    room = context_tokens - prompt_tokens
    if params.min_tokens > room:
        message = f"min_tokens is {params.min_tokens}, but the prompt leaves room for {room} tokens."
        raise InvalidRequest(message, "min_tokens")
    return replace(params, max_tokens=room)


class Admission:
    """Counts who waits and who is active, and refuses more than the queue's bound."""

    def __init__(self, max_queued: int, max_active: int) -> None:
        self._max_queued = max_queued
        self._max_active = max_active
        self._ended: deque[float] = deque()
        self.queued = 0
        self.active = 0

    def enter(self, now_s: float) -> None:
        """A request joins the queue. Raises Overloaded, saying when to come back, when it is full."""
        if self.queued >= self._max_queued:
            raise Overloaded(
                f"The queue is full: {self.queued} requests are waiting.", self.retry_after_s(now_s)
            )
        self.queued += 1

    @property
    def may_start(self) -> bool:
        """Whether one more request may become active."""
        return self.active < self._max_active

    def started(self) -> None:
        """A queued request was given to a prefill worker."""
        self.queued -= 1
        self.active += 1

    def ended(self, was_started: bool, now_s: float) -> None:
        """A request left, from the queue or after it was active."""
        if not was_started:
            self.queued -= 1
            return
        self.active -= 1
        self._ended.append(now_s)
        while self._ended[0] < now_s - RATE_WINDOW_S:
            self._ended.popleft()

    def retry_after_s(self, now_s: float) -> float:
        """Seconds until the queue will have moved on, by the rate at which requests ended lately; 1 to 60."""
        while self._ended and self._ended[0] < now_s - RATE_WINDOW_S:
            self._ended.popleft()
        if not self._ended:
            return LONGEST_RETRY_S / 2 if self.active else 1.0
        rate = len(self._ended) / RATE_WINDOW_S
        return min(LONGEST_RETRY_S, max(1.0, math.ceil(self.queued / rate)))


@dataclass(frozen=True, slots=True, order=True)
class QueueOrder:
    """Sort key of a waiting leg: higher priority, then earlier deadline, then earlier arrival goes first."""

    negative_priority: int
    deadline_s: float
    arrival: int


ItemT = TypeVar("ItemT")


class WaitingQueue(Generic[ItemT]):
    """Waiting items in order; an item leaves from the front or is removed wherever it stands."""

    def __init__(self) -> None:
        self._heap: list[tuple[QueueOrder, ItemT]] = []
        self._live: dict[ItemT, QueueOrder] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: ItemT) -> bool:
        return item in self._live

    def push(self, item: ItemT, priority: int, deadline_s: float) -> None:
        """Joins the queue."""
        self._arrivals += 1
        order = QueueOrder(-priority, deadline_s, self._arrivals)
        self._live[item] = order
        heapq.heappush(self._heap, (order, item))

    def remove(self, item: ItemT) -> bool:
        """Leaves the queue; whether it was in it."""
        return self._live.pop(item, None) is not None

    def first(self) -> ItemT | None:
        """The item whose turn it is, which stays in the queue; None when the queue is empty."""
        while self._heap:
            order, item = self._heap[0]
            if self._live.get(item) is order:
                return item
            heapq.heappop(self._heap)
        return None

    def items(self) -> tuple[ItemT, ...]:
        """All waiting items, in no order."""
        return tuple(self._live)
