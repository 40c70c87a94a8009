"""Edge: the router as a process of its own: `python -m cluster.router_host`, told what to do on stdin.

The first line of stdin is a RouterSpec as JSON. The process answers with one line of JSON on stdout once its
ports are bound, and drains when stdin ends (its parent went away) or on SIGTERM.
"""

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
import uvloop
from pydantic import TypeAdapter

from cluster.config import REDIS_PASSWORD_ENV
from cluster.membership import StoreMembership
from cluster.store import Store, StoreAddress
from router.config import RouterConfig
from tandem.logs import configure_logging

if TYPE_CHECKING:
    from router.server import RouterPorts

MAX_SPEC_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """All that the process needs, besides the secrets, which its environment holds."""

    config: RouterConfig
    store_url: str
    store_namespace: str
    store_tls_ca: str | None
    registry_lease_s: float

    def to_line(self) -> bytes:
        """One line of JSON."""
        return _SPEC.dump_json(self) + b"\n"

    @staticmethod
    def from_line(line: bytes) -> "RouterSpec":
        """The inverse of to_line. Raises pydantic.ValidationError."""
        return _SPEC.validate_json(line)


_SPEC = TypeAdapter(RouterSpec)


@dataclass(frozen=True, slots=True)
class BoundPorts:
    """What the process answers with."""

    grpc_port: int
    http_port: int

    def to_line(self) -> bytes:
        """One line of JSON."""
        return orjson.dumps(self) + b"\n"

    @staticmethod
    def from_line(line: bytes) -> "BoundPorts":
        """The inverse of to_line. Raises pydantic.ValidationError."""
        return TypeAdapter(BoundPorts).validate_json(line)


async def _stdin_reader() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=MAX_SPEC_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _announce(ports: "RouterPorts") -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), BoundPorts(ports.grpc_port, ports.http_port).to_line())


async def _serve() -> None:
    from router.server import serve_router

    reader = await _stdin_reader()
    spec = RouterSpec.from_line(await reader.readline())
    password = os.environ.get(REDIS_PASSWORD_ENV)
    store = Store(StoreAddress(spec.store_url, spec.store_namespace, spec.store_tls_ca, password))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    parent = asyncio.create_task(reader.read())
    parent.add_done_callback(lambda _task: stop.set())
    try:
        await serve_router(spec.config, StoreMembership(store, spec.registry_lease_s), stop, _announce)
    finally:
        parent.cancel()
        await asyncio.gather(parent, return_exceptions=True)
        await store.close()


def main() -> None:
    """Serves until told to stop."""
    configure_logging()
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
