"""Edge: a sink that pulls encoded blocks, and decodes them as they land."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from kvtransfer.contract import (
    BlockRange,
    HandoffKey,
    PullReport,
    SinkTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.adoption import OnExchanged
from kvtransfer.handoffs.pieces import layer_span
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.staging import StagedMemory
from kvtransfer.threads import outlast, run_to_end
from tandem.ids import BlockId
from tandem.worker import WorkerRecord


class CodedSink(HandoffSink):
    """A HandoffSink into encoded blocks; the target blocks of `pull` are the pool's."""

    def __init__(
        self,
        me: WorkerRecord,
        staged: StagedMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        token: str | None,
        transports: Sequence[SinkTransport] | None = None,
        observer: TransferObserver | None = None,
    ) -> None:
        """`transports` must be of `staged`."""
        super().__init__(me, staged, config, clock, token, transports, observer)
        self._staged = staged
        self._decoder = ThreadPoolExecutor(max(1, config.max_pulls), "kv-decode")

    async def pull(
        self,
        key: HandoffKey,
        source: WorkerRecord,
        block_range: BlockRange,
        target_blocks: Sequence[BlockId],
        priority: int,
        remaining_s: float,
        on_exchanged: OnExchanged | None = None,
    ) -> PullReport:
        """See HandoffSink; encoded blocks are never adopted.

        The decoding of the last pieces only computes, and is not part of `remaining_s`.

        Pieces are decoded while the next ones move, before their checksums are confirmed: until the pull
        succeeds, the content of the target blocks means nothing.
        """
        landed: asyncio.Queue[BlockRange | None] = asyncio.Queue()
        begin = block_range.first_block
        decoding = asyncio.create_task(self._decode(landed, begin, tuple(target_blocks)))
        try:
            wanted = block_range, target_blocks
            report = await self._pull(key, source, *wanted, priority, remaining_s, landed.put_nowait)
            landed.put_nowait(None)
            began_s = self._clock()
            await asyncio.shield(decoding)
            return replace(report, decode_s=self._clock() - began_s)
        finally:
            decoding.cancel()
            if await outlast(decoding):
                raise asyncio.CancelledError

    async def _decode(
        self, landed: "asyncio.Queue[BlockRange | None]", first_block: int, targets: tuple[BlockId, ...]
    ) -> None:
        """Decodes what lands, in order, until None comes; when it ends, nothing writes the targets."""
        while (part := await landed.get()) is not None:
            begin = part.first_block - first_block
            blocks = targets[begin : begin + part.num_blocks]
            layers = range(*layer_span(part, self._staged.layers))
            stop = threading.Event()
            await run_to_end(
                self._decoder, partial(self._staged.decode, blocks, layers, stop.is_set), stop.set
            )

    async def close(self) -> None:
        """See HandoffSink."""
        await super().close()
        self._decoder.shutdown(wait=True)
