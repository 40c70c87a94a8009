"""Pure: what a session tells the edge to do, and what each kind of drop means to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.leg import DropReason
from router.worker_key import WorkerKey
from tandem.ids import LegId


@dataclass(frozen=True, slots=True)
class PlacePrefill:
    """Choose a prefill worker for this leg, not before its `not_before_s`."""

    leg_id: LegId


@dataclass(frozen=True, slots=True)
class PlacePrefetch:
    """Choose a decode worker for this leg if one has room now: its KV can be fetched while it is read."""

    leg_id: LegId


@dataclass(frozen=True, slots=True)
class SendDecode:
    """Start this leg at the decode worker that fetches its KV already."""

    leg_id: LegId
    worker: WorkerKey


@dataclass(frozen=True, slots=True)
class PlaceDecode:
    """Choose a decode worker for this leg now: its KV is offered."""

    leg_id: LegId


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell a worker to stop a leg, or only some of its samples (empty: all)."""

    worker: WorkerKey
    leg_id: LegId
    samples: tuple[int, ...] = ()


Command = PlacePrefill | PlacePrefetch | PlaceDecode | SendDecode | Cancel


@dataclass(frozen=True, slots=True)
class DropRule:
    """What a drop means: whether it counts as a failure, and whether a pause comes before the next try."""

    counts: bool
    pauses: bool = False


DROP_RULES: Mapping[DropReason, DropRule] = MappingProxyType(
    {
        DropReason.OVERLOADED: DropRule(counts=False, pauses=True),
        DropReason.HANDOFF_FAILED: DropRule(counts=True),
        DropReason.PREEMPTED: DropRule(counts=False),
        DropReason.OFFER_EXPIRED: DropRule(counts=False),
        DropReason.DRAINING: DropRule(counts=False, pauses=True),
        DropReason.TOO_LARGE: DropRule(counts=True),
        DropReason.INTERNAL: DropRule(counts=True, pauses=True),
    }
)
