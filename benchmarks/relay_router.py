"""Edge: one real router on one core, between stub workers: `python -m benchmarks.relay_router`.

Reads a RelaySpec as one line of JSON on stdin, answers with its gRPC port on stdout, ends with stdin.
"""

import asyncio
import logging
import os
import sys
from dataclasses import dataclass

import uvloop
from pydantic import TypeAdapter

from router.config import RouterConfig
from router.membership import FixedMembership
from router.server import RouterPorts, serve_router
from tandem.logs import configure_logging
from tandem.worker import WorkerRecord


@dataclass(frozen=True, slots=True)
class RelaySpec:
    """What the router is told; `core` is the one it may run on."""

    config: RouterConfig
    workers: tuple[WorkerRecord, ...]
    core: int

    def to_line(self) -> bytes:
        """One line of JSON."""
        return _SPEC.dump_json(self) + b"\n"

    @staticmethod
    def from_line(line: bytes) -> "RelaySpec":
        """The inverse of to_line. Raises pydantic.ValidationError."""
        return _SPEC.validate_json(line)


_SPEC = TypeAdapter(RelaySpec)


async def _serve(spec: RelaySpec) -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    waiting.add_done_callback(lambda _task: stop.set())

    def announce(ports: RouterPorts) -> None:
        print(ports.grpc_port, flush=True)

    await serve_router(spec.config, FixedMembership(spec.workers), stop, announce)
    await waiting


def main() -> None:
    """Serves until stdin ends."""
    spec = RelaySpec.from_line(sys.stdin.buffer.readline())
    configure_logging(logging.WARNING)
    os.sched_setaffinity(0, {spec.core})
    uvloop.run(_serve(spec))


if __name__ == "__main__":
    main()
