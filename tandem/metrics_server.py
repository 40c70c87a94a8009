"""Edge: Prometheus metrics over HTTP, in a thread of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

CLOSE_S = 2.0


@contextmanager
def metrics_served(registry: CollectorRegistry, host: str, port: int | None) -> Iterator[int | None]:
    """Serves a registry until the block ends; gives the port, None where none was asked for.

    Port 0 lets the system choose. Raises OSError when the port is taken.
    """
    if port is None:
        yield None
        return
    server, thread = start_http_server(port, addr=host, registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=CLOSE_S)
