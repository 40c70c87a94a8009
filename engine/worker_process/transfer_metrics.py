"""Edge: what a worker's metrics say of KV transfers; fed by kvtransfer as its TransferObserver."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from tandem.errors import TransferFault
from tandem.ids import WorkerId


class _Source(Protocol):
    """A life of a source."""

    @property
    def worker_id(self) -> WorkerId:
        """Its worker's name."""
        ...


class TransferMetrics:
    """Satisfies kvtransfer.contract.TransferObserver."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._landed = Counter(
            "tandem_worker_transfers",
            "Transfers that landed (a hand-off that overlaps its prefill has several), by transport.",
            ["transport"],
            registry=registry,
        )
        self._failures = Counter(
            "tandem_worker_transfer_failures",
            "Transfers or connections that failed, by transport and fault.",
            ["transport", "fault"],
            registry=registry,
        )
        self._changes = Counter(
            "tandem_worker_transport_changes",
            "Pairs that went from one transport to another, away from a failed one or back.",
            ["before", "now"],
            registry=registry,
        )
        self._roads = Gauge(
            "tandem_worker_transport",
            "1 for the transport that last moved KV from a source.",
            ["source", "transport"],
            registry=registry,
        )
        self._refusals = Counter(
            "tandem_worker_handoff_refusals",
            "Requests of peers, and answers of them, that were refused, by fault.",
            ["fault"],
            registry=registry,
        )

        self._link_refusals = Counter(
            "tandem_worker_link_refusals",
            "Data connections, and requests on them, that a source refused, by transport and fault.",
            ["transport", "fault"],
            registry=registry,
        )

    def transferred(self, transport: str) -> None:
        """A transfer landed."""
        self._landed.labels(transport).inc()

    def failed(self, transport: str, fault: TransferFault) -> None:
        """A transfer failed, or the transport could not be connected."""
        self._failures.labels(transport, fault.value).inc()

    def road_taken(self, source: _Source, before: str, now: str) -> None:
        """The pair's transport changed; empty where there is none."""
        if before:
            self._roads.remove(source.worker_id, before)
        if now:
            self._roads.labels(source.worker_id, now).set(1)
        if before and now:
            self._changes.labels(before, now).inc()

    def refused(self, fault: TransferFault) -> None:
        """Something was refused."""
        self._refusals.labels(fault.value).inc()

    def link_refused(self, transport: str, fault: TransferFault) -> None:
        """A data connection, or a request on one, was refused."""
        self._link_refusals.labels(transport, fault.value).inc()
