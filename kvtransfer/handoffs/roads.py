"""Edge: which transport the next transfers of each pair take, told to the metrics and the log."""

from collections.abc import Callable, Sequence

import structlog

from kvtransfer.contract import PeerId, TransferConfig, TransferObserver
from kvtransfer.handoffs.road_choice import RoadChoice
from tandem.errors import TransferFault

_log = structlog.get_logger("tandem.kvtransfer")


class Roads:
    """A RoadChoice with a clock (monotonic, seconds), and somebody who counts."""

    def __init__(
        self, config: TransferConfig, clock: Callable[[], float], observer: TransferObserver | None
    ) -> None:
        self._choice = RoadChoice(config.backoff_s, config.backoff_cap_s)
        self._clock = clock
        self._observer = observer
        self._taken: dict[PeerId, str] = {}

    def order(self, source: PeerId, names: Sequence[str]) -> tuple[str, ...]:
        """The transports to try, best first."""
        return self._choice.order(source, names, self._clock())

    def worked(self, source: PeerId, name: str) -> None:
        """A transfer landed."""
        self._choice.worked(source, name)
        before = self._taken.get(source, "")
        self._taken[source] = name
        if before not in ("", name):
            _log.info("transport changed", source=source.worker_id, before=before, now=name)
        if self._observer is None:
            return
        self._observer.transferred(name)
        if before != name:
            self._observer.road_taken(source, before, name)

    def failed(self, source: PeerId, name: str, fault: TransferFault) -> None:
        """A transport could not be connected, or a transfer over it failed."""
        self._choice.failed(source, name, self._clock())
        if self._observer is not None:
            self._observer.failed(name, fault)

    def refused(self, fault: TransferFault) -> None:
        """What a source granted made no sense."""
        if self._observer is not None:
            self._observer.refused(fault)

    def forget(self, source: PeerId) -> None:
        """A life of a source is over."""
        self._choice.forget(source)
        before = self._taken.pop(source, "")
        if before and self._observer is not None:
            self._observer.road_taken(source, before, "")
