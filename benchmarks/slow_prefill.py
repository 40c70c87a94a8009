"""Edge: `python -m benchmarks.slow_prefill RATE ...`: a prefill worker whose links carry RATE bytes/s."""

import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from engine.worker_process.by_hand import run_by_hand
from engine.worker_process.worker import WorkerParts, open_worker
from kvtransfer.contract import BlockMemory, SourceTransport, TransferConfig
from kvtransfer.faults import ThrottledSource
from prefill_worker.service import PrefillWorker
from tandem.worker import Role
from tandem.worker_config import WorkerConfig


class SlowPrefillWorker(PrefillWorker):
    """A prefill worker behind a slow link."""

    def __init__(self, parts: WorkerParts, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        super().__init__(parts)

    def source_transports(self, memory: BlockMemory, config: TransferConfig) -> Sequence[SourceTransport]:
        """The usual ones, throttled."""
        usual = super().source_transports(memory, config)
        return [ThrottledSource(transport, self._bytes_per_s) for transport in usual]


def run(bytes_per_s: float, arguments: Sequence[str]) -> int:
    """Serves until SIGTERM; the arguments are those of `python -m prefill_worker`."""

    def open_slow(config: WorkerConfig, token: str | None) -> AbstractAsyncContextManager[SlowPrefillWorker]:
        return open_worker(partial(SlowPrefillWorker, bytes_per_s=bytes_per_s), config, token)

    return run_by_hand(Role.PREFILL, open_slow, arguments)


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), sys.argv[2:]))
