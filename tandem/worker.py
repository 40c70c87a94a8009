"""Pure: how a worker is described to others."""

from dataclasses import dataclass
from enum import Enum

from tandem.ids import Incarnation, WorkerId


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One life of a worker, as the registry knows it.

    `address` is the host:port of its gRPC server; `digest` the compatibility digest: only equal ones pair.
    """

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    address: str
    digest: str
