"""Pure: what passes between the simulated router and its workers, in both directions."""

from dataclasses import dataclass
from typing import Protocol

from engine.kv.blocks import CacheDelta
from engine.leg import DropReason
from planner.workloads.workload import SimRequest
from router.leg import Leg
from router.session import Session
from router.timeline import Pace
from router.worker_key import WorkerKey
from tandem.ids import LegId
from tandem.sampling import FinishReason


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request under way; `started` once a prefill worker was given one of its legs."""

    asked: SimRequest
    session: Session
    leg_id: LegId | None = None
    started: bool = False


class Site(Protocol):
    """A simulated worker, as the router sees it."""

    @property
    def alive(self) -> bool:
        """Whether anything happens there any more."""
        ...

    def start_prefill(self, live: LiveRequest, leg: Leg) -> None:
        """Takes a prompt to read, or drops it by an event."""
        ...

    def prefetch(self, live: LiveRequest, leg: Leg, source: WorkerKey, epoch: int) -> None:
        """Fetches the KV of a leg that `source` still reads, or says by an event that it does not."""
        ...

    def start_decode(self, live: LiveRequest, leg: Leg, source: WorkerKey) -> None:
        """Takes a leg whose KV is offered by `source`, or drops it by an event."""
        ...

    def cancel(self, leg_id: LegId) -> None:
        """Stops a leg; unknown ones are ignored."""
        ...

    def tell(self, leg_id: LegId) -> None:
        """Tells the router all tokens of a leg that have come by now; unknown ones are ignored."""
        ...


class News(Protocol):
    """What workers tell the router."""

    def tokens(
        self,
        key: WorkerKey,
        leg_id: LegId,
        upto: int,
        finish: FinishReason | None,
        pace: Pace | None,
        last_s: float,
    ) -> None:
        """A worker has written the output of a leg up to index `upto` (exclusive), the last of it then."""
        ...

    def growing(self, key: WorkerKey, leg_id: LegId, epoch: int) -> None:
        """A prefill worker reads the leg, and its KV can be fetched meanwhile."""
        ...

    def offered(self, key: WorkerKey, leg_id: LegId, epoch: int, cached_tokens: int) -> None:
        """A prefill worker parks the leg's KV."""
        ...

    def landed(self, key: WorkerKey, leg_id: LegId, transport: str, moved_bytes: int) -> None:
        """A decode worker holds the leg's KV."""
        ...

    def prefetch_lost(self, key: WorkerKey, leg_id: LegId) -> None:
        """A decode worker does not fetch the leg early any more."""
        ...

    def dropped(self, key: WorkerKey, leg_id: LegId, reason: DropReason, message: str) -> None:
        """A worker gave a leg up."""
        ...

    def cached(self, key: WorkerKey, news: CacheDelta, whole: bool) -> None:
        """A worker's prefix cache changed, or this is all of it. Raises ProtocolError if news are missing."""
        ...
