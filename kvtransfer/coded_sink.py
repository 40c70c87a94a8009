"""Edge: a sink that pulls encoded blocks, and decodes them when the source has confirmed their checksums."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kvtransfer.contract import (
    BlockRange,
    HandoffKey,
    PullReport,
    SinkTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.adoption import OnExchanged
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.staging import StagedMemory
from kvtransfer.threads import run_to_end
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

        Decoding follows the commit, only computes, and is not part of `remaining_s`.
        """
        report = await super().pull(key, source, block_range, target_blocks, priority, remaining_s)
        began_s = self._clock()
        stop = threading.Event()
        await run_to_end(self._decoder, lambda: self._staged.decode(target_blocks, stop.is_set), stop.set)
        return replace(report, decode_s=self._clock() - began_s)

    async def close(self) -> None:
        """See HandoffSink."""
        await super().close()
        self._decoder.shutdown(wait=True)
