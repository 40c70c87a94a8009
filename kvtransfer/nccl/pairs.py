"""Edge: the communicators of one side of a worker: room for a new one, what they take, and their end."""

import asyncio

from kvtransfer.nccl.communicator import CommunicatorCounts, CommunicatorLimits, CommunicatorState, LruOrder
from kvtransfer.nccl.threaded_communicator import PairCommunicator


class CommunicatorShelf:
    """Knows every communicator that holds a thread or device memory; ends idle ones to make room."""

    def __init__(self, limits: CommunicatorLimits) -> None:
        self._limits = limits
        self._order: LruOrder[PairCommunicator] = LruOrder()
        self._held: set[PairCommunicator] = set()

    def admit(self, communicator: PairCommunicator) -> bool:
        """Makes room for one that is about to open; False when there is none."""
        self._sweep()
        if self.counts().abandoned >= self._limits.max_abandoned:
            return False
        busy = [held for held in self._held if held.busy or held.state is CommunicatorState.OPENING]
        victims = self._order.victims(self._limits.max_open, busy)
        if victims is None:
            return False
        for victim in victims:
            self._order.forget(victim)
            victim.end()
        self._order.used(communicator)
        self._held.add(communicator)
        return True

    def used(self, communicator: PairCommunicator) -> None:
        """Notes that a transfer begins on it."""
        self._order.used(communicator)

    def counts(self) -> CommunicatorCounts:
        """All of them together."""
        total = CommunicatorCounts()
        for communicator in self._held:
            total = total.plus(communicator.counts())
        return total

    async def close(self) -> None:
        """Ends all of them at one time, each within its own bounds."""
        for communicator in self._held:
            communicator.end()
        await asyncio.gather(*(communicator.ended() for communicator in self._held))
        self._sweep()

    def _sweep(self) -> None:
        """Forgets what is closed; what hangs stays known."""
        for communicator in tuple(self._held):
            if communicator.state.over:
                self._order.forget(communicator)
            if communicator.state is CommunicatorState.CLOSED:
                self._held.discard(communicator)
