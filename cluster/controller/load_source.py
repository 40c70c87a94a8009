"""Edge: asks the routers what came and how it ended."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import structlog

from cluster.controller.load_windows import RouterSample, WorkerSample
from tandem.client import AsyncTandemClient
from tandem.errors import NotReady, TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.v1 import cluster_pb2 as cpb
from tandem.wire import ROLE_FROM_WIRE

log = structlog.get_logger(__name__)


class LoadSource(Protocol):
    """Where a controller learns the load."""

    async def read(self) -> tuple[RouterSample, ...]:
        """One sample of each router that answers. Raises NotReady when none does."""
        ...


class RouterLoads:
    """Routers at fixed addresses; use as `async with`. The API key comes from TANDEM_API_KEY."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._clients = [AsyncTandemClient(address) for address in addresses]
        self._told: dict[str, tuple[str, int]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    async def read(self) -> tuple[RouterSample, ...]:
        """One sample of each router that answers. Raises NotReady when none does."""
        answers = await asyncio.gather(*map(self._ask, self._clients), return_exceptions=True)
        samples = [answer for answer in answers if isinstance(answer, RouterSample)]
        faults = [answer for answer in answers if isinstance(answer, BaseException)]
        for fault in faults:
            if not isinstance(fault, TandemError):
                raise fault
        if not samples:
            raise NotReady(f"No router tells its load: {faults[0]}")
        for fault in faults:
            log.warning("a router does not tell its load", error=str(fault))
        return tuple(samples)

    async def _ask(self, client: AsyncTandemClient) -> RouterSample:
        router_id, after = self._told.get(client.address, ("", 0))
        answer = await client.load(after)
        if answer.router_id != router_id and after:
            # Another life counts from its own start.
            answer = await client.load(0)
        self._told[client.address] = (answer.router_id, answer.ended)
        return _sample(answer)


def _sample(answer: cpb.LoadResponse) -> RouterSample:
    return RouterSample(
        answer.router_id,
        answer.offered,
        answer.settled,
        answer.good,
        tuple((one.prompt_tokens, one.output_tokens) for one in answer.lengths),
        tuple(
            WorkerSample(
                WorkerId(status.worker.worker_id),
                Incarnation(status.worker.incarnation),
                role,
                status.load.busy_s,
                status.attached and not status.load.draining,
            )
            for status in answer.workers
            if (role := ROLE_FROM_WIRE.get(status.role)) is not None
        ),
    )
