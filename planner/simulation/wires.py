"""Pure: messages between the simulated router and a worker that take their time.

A worker whose hops take none is given the router itself, and the router the worker.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

from engine.kv.blocks import CacheDelta
from engine.leg import DropReason
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.site import LiveRequest, News, Site
from router.leg import Leg
from router.timeline import Pace
from router.worker_key import WorkerKey
from tandem.ids import LegId
from tandem.sampling import FinishReason


class Wire:
    """One direction; messages are heard in the order in which they were sent."""

    def __init__(self, events: EventQueue, delay_s: float) -> None:
        self.delay_s = delay_s
        self._events = events
        self._on_way: deque[Callable[[], None]] = deque()

    def send(self, heard: Callable[[], None]) -> None:
        """`heard` is called when the message is there."""
        self._on_way.append(heard)
        self._events.at(self._events.now_s + self.delay_s, NEWS, self._arrived, heard)

    def flush(self) -> None:
        """What is on its way is heard now."""
        while self._on_way:
            self._on_way.popleft()()

    def _arrived(self, heard: Callable[[], None]) -> None:
        if self._on_way and self._on_way[0] is heard:
            self._on_way.popleft()()


class NewsWire:
    """News of one worker on its way to the router. Times of tokens are those of their arrival.

    What is on its way when the worker dies, or when a request's time is up, is heard at once, so that runs of
    steps, which are told late, tell as much as single steps.
    """

    def __init__(self, news: News, wire: Wire) -> None:
        self._news = news
        self._wire = wire

    def tokens(
        self,
        key: WorkerKey,
        leg_id: LegId,
        upto: int,
        finish: FinishReason | None,
        pace: Pace | None,
        last_s: float,
    ) -> None:
        """See News."""
        late_s = self._wire.delay_s
        if pace is not None:
            pace = Pace(pace.first_s + late_s, pace.longest_gap_s)
        self._wire.send(partial(self._news.tokens, key, leg_id, upto, finish, pace, last_s + late_s))

    def growing(self, key: WorkerKey, leg_id: LegId, epoch: int) -> None:
        """See News."""
        self._wire.send(partial(self._news.growing, key, leg_id, epoch))

    def offered(self, key: WorkerKey, leg_id: LegId, epoch: int, cached_tokens: int) -> None:
        """See News."""
        self._wire.send(partial(self._news.offered, key, leg_id, epoch, cached_tokens))

    def landed(self, key: WorkerKey, leg_id: LegId, transport: str, moved_bytes: int) -> None:
        """See News."""
        self._wire.send(partial(self._news.landed, key, leg_id, transport, moved_bytes))

    def prefetch_lost(self, key: WorkerKey, leg_id: LegId) -> None:
        """See News."""
        self._wire.send(partial(self._news.prefetch_lost, key, leg_id))

    def dropped(self, key: WorkerKey, leg_id: LegId, reason: DropReason, message: str) -> None:
        """See News."""
        self._wire.send(partial(self._news.dropped, key, leg_id, reason, message))

    def cached(self, key: WorkerKey, news: CacheDelta, whole: bool) -> None:
        """See News; heard at once."""
        self._news.cached(key, news, whole)


class FarSite:
    """A worker to which the router's messages take their time; a dead one hears none."""

    def __init__(self, site: Site, to_worker: Wire, to_router: Wire) -> None:
        self._site = site
        self._to_worker = to_worker
        self._to_router = to_router

    @property
    def alive(self) -> bool:
        """See Site."""
        return self._site.alive

    def start_prefill(self, live: LiveRequest, leg: Leg) -> None:
        """See Site."""
        self._send(partial(self._site.start_prefill, live, leg))

    def prefetch(self, live: LiveRequest, leg: Leg, source: WorkerKey, epoch: int) -> None:
        """See Site."""
        self._send(partial(self._site.prefetch, live, leg, source, epoch))

    def start_decode(self, live: LiveRequest, leg: Leg, source: WorkerKey) -> None:
        """See Site."""
        self._send(partial(self._site.start_decode, live, leg, source))

    def cancel(self, leg_id: LegId) -> None:
        """See Site."""
        self._send(partial(self._site.cancel, leg_id))

    def tell(self, leg_id: LegId) -> None:
        """See Site."""
        self._site.tell(leg_id)
        self._to_router.flush()

    def _send(self, heard: Callable[[], None]) -> None:
        self._to_worker.send(partial(self._heard, heard))

    def _heard(self, heard: Callable[[], None]) -> None:
        if self._site.alive:
            heard()
