"""Pure: where a router learns which workers live; the cluster implements it over Redis."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from tandem.worker import Role, WorkerRecord


class Membership(Protocol):
    """Names the living workers."""

    def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """Yields all living workers, first at once and then after every change.

        While the registry cannot be reached it yields nothing: serving goes on with the last snapshot.
        """
        ...

    def desired(self) -> Mapping[Role, int]:
        """How many workers of each role are wanted, as last seen; empty when nobody said."""
        ...


class FixedMembership:
    """A list that never changes, for workers started by hand."""

    def __init__(self, workers: Sequence[WorkerRecord]) -> None:
        self._workers = tuple(workers)

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """Yields the list once."""
        yield self._workers

    def desired(self) -> Mapping[Role, int]:
        """Nobody said."""
        return {}
