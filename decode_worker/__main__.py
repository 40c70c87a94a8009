"""Edge: `python -m decode_worker` starts one decode worker by hand."""

import sys

from decode_worker.service import DecodeWorker
from engine.worker_process.by_hand import run_by_hand
from tandem.worker import Role

if __name__ == "__main__":
    sys.exit(run_by_hand(Role.DECODE, DecodeWorker.open))
