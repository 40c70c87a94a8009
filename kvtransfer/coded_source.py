"""Edge: a source whose blocks are encoded before they move: its offers grow as their blocks are encoded."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog

from kvtransfer.codecs.order import next_batch, with_batch
from kvtransfer.contract import (
    BlockRange,
    HandoffKey,
    KvReady,
    SourceTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.pieces import grown, layer_span
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.staging import StagedMemory
from tandem.ids import BlockId
from tandem.worker import WorkerRecord

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(slots=True)
class _Encoding:
    """An offer's way into its encoded form: how much is `ready` in the pool, and how much is `encoded`.

    `batch` is what a thread encodes, or will soon; `released` is why the offer ended, kept until then.
    """

    blocks: tuple[BlockId, ...]
    ready: KvReady
    encoded: KvReady
    batch: Future[None] | None = None
    released: ReleaseReason | None = None


class CodedSource(HandoffSource):
    """A HandoffSource over encoded blocks; `offer` and `advance` speak of the pool's blocks and layers.

    Blocks are encoded when all their layers are there, those of the last chunk layer by layer. Of an offer
    that ends, `on_released` is called when no thread encodes its blocks any more, one batch later at most.
    """

    def __init__(
        self,
        me: WorkerRecord,
        staged: StagedMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        on_released: Callable[[HandoffKey, ReleaseReason], None],
        transports: Sequence[SourceTransport] | None = None,
        observer: TransferObserver | None = None,
    ) -> None:
        """`transports` must be of `staged`."""
        super().__init__(me, staged, config, clock, self._offer_ended, transports, observer)
        self._staged = staged
        self._on_blocks_free = on_released
        self._encodings: dict[HandoffKey, _Encoding] = {}
        self._batches: set[asyncio.Future[None]] = set()
        self._encoder = ThreadPoolExecutor(1, "kv-encode")

    def offer(self, key: HandoffKey, blocks: Sequence[BlockId], ready: KvReady | None = None) -> None:
        """See HandoffSource."""
        whole = KvReady(len(blocks), self._staged.layers)
        super().offer(key, blocks, KvReady(0, 0))
        self._encodings[key] = _Encoding(tuple(blocks), whole if ready is None else ready, KvReady(0, 0))
        self._go_on(key)

    def advance(self, key: HandoffKey, ready: KvReady) -> None:
        """See HandoffSource."""
        encoding = self._encodings.get(key)
        if encoding is not None and encoding.released is None:
            encoding.ready = grown(encoding.ready, ready)
            self._go_on(key)

    async def close(self) -> None:
        """See HandoffSource."""
        await super().close()
        while self._batches:
            await asyncio.wait(tuple(self._batches))
        self._encoder.shutdown(wait=True)

    def _go_on(self, key: HandoffKey) -> None:
        """Starts on the next batch of an offer unless one is under way or nothing is there to encode."""
        encoding = self._encodings.get(key)
        if encoding is None or encoding.batch is not None:
            return
        staged, total = self._staged, len(encoding.blocks)
        batch = next_batch(encoding.ready, encoding.encoded, total, staged.layers, staged.batch_parts)
        if batch is None:
            return
        blocks = encoding.blocks[batch.first_block : batch.first_block + batch.num_blocks]
        layers = range(*layer_span(batch, staged.layers))
        encoding.batch = self._encoder.submit(staged.encode, blocks, layers)
        running = asyncio.wrap_future(encoding.batch)
        self._batches.add(running)
        running.add_done_callback(partial(self._batch_ended, key, batch))

    def _batch_ended(self, key: HandoffKey, batch: BlockRange, running: asyncio.Future[None]) -> None:
        self._batches.discard(running)
        encoding = self._encodings[key]
        encoding.batch = None
        if encoding.released is not None:
            self._offer_ended(key, encoding.released)
            return
        failure = running.exception()
        if failure is not None:
            _log.error("blocks were not encoded", leg=key.leg_id, error=str(failure))
            self.withdraw(key.leg_id)
            return
        encoding.encoded = with_batch(encoding.encoded, batch, len(encoding.blocks), self._staged.layers)
        super().advance(key, encoding.encoded)
        self._go_on(key)

    def _offer_ended(self, key: HandoffKey, reason: ReleaseReason) -> None:
        encoding = self._encodings.get(key)
        if encoding is not None and encoding.batch is not None:
            encoding.released = reason
            # One that has not begun is not begun: the thread goes on with offers that are wanted.
            encoding.batch.cancel()
            return
        self._encodings.pop(key, None)
        self._on_blocks_free(key, reason)
