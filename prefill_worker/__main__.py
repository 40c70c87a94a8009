"""Edge: `python -m prefill_worker` starts one prefill worker by hand."""

import sys

from engine.worker_process.by_hand import run_by_hand
from prefill_worker.service import PrefillWorker
from tandem.worker import Role

if __name__ == "__main__":
    sys.exit(run_by_hand(Role.PREFILL, PrefillWorker.open))
