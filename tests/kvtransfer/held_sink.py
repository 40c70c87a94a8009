"""Edge: a taking side of a test that waits for the test before it takes anything."""

import asyncio
from collections.abc import Sequence

from kvtransfer.contract import BlockMemory, OnLanded, PeerId, PullGrant, SinkTransport
from kvtransfer.faults import Fault, FaultSchedule, FaultySink
from tandem.ids import BlockId


class HeldSink(FaultySink):
    """Begins to receive only when it is let; `began` says that it was asked to."""

    def __init__(self, inner: SinkTransport, pool: BlockMemory) -> None:
        super().__init__(inner, pool, FaultSchedule(1, {Fault.NONE: 1.0}))
        self.began = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """As the base does, in the end."""
        self.began.set()
        await self.may_go_on.wait()
        return await super().receive(source, grant, target, on_landed)
