"""Edge: one life of a worker: takes an incarnation, loads, registers, serves until told to drain."""

import asyncio
import contextlib
import importlib
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import structlog
from pydantic import TypeAdapter

from cluster.config import REDIS_PASSWORD_ENV
from cluster.membership import registered
from cluster.store import RegisteredWorker, Store, StoreAddress, StoreUnavailable
from tandem.errors import ConfigError, TandemError
from tandem.grpc_edge import CLUSTER_TOKEN_ENV
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role, WorkerRecord
from tandem.worker_config import WorkerConfig

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

STORE_RETRY_S = 0.3
STALL_LIMIT_S = 60.0
"""A step takes well under ten seconds even on a busy CPU."""
STALL_CHECK_S = 1.0
EXIT_STALLED = 70


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a process needs to become a worker, besides the secrets, which its environment holds.

    `config.incarnation` and `config.model_folder` are placeholders: each life takes its own incarnation, and
    each host resolves `model_source` for itself. `log_file` empty leaves the process's output where it is.
    """

    config: WorkerConfig
    model_source: str
    store_url: str
    store_namespace: str
    store_tls_ca: str | None
    registry_lease_s: float
    drain_timeout_s: float
    log_file: str = ""

    def to_json(self) -> str:
        """As text, for the way to another process."""
        return _SPEC.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> "WorkerSpec":
        """The inverse of to_json. Raises pydantic.ValidationError."""
        return _SPEC.validate_json(text)

    def store_address(self, environment: Mapping[str, str]) -> StoreAddress:
        """Where the registry is; its password comes from the environment."""
        password = environment.get(REDIS_PASSWORD_ENV)
        return StoreAddress(self.store_url, self.store_namespace, self.store_tls_ca, password)


_SPEC = TypeAdapter(WorkerSpec)


class HostedWorker(Protocol):
    """What prefill_worker.service and decode_worker.service promise to a host."""

    record: WorkerRecord

    async def drain(self, timeout_s: float) -> None:
        """Takes no new legs and waits for the running ones."""
        ...

    def stalled_s(self) -> float:
        """Seconds that the step in flight has been running; 0 between steps."""
        ...

    def wedged(self) -> str | None:
        """Why only a restart of the process helps; None while all is well."""
        ...

    async def failed(self) -> None:
        """Raises when the worker cannot go on; waits for ever otherwise."""
        ...


async def host_worker(spec: WorkerSpec, stop: asyncio.Event) -> None:
    """Serves until `stop`, then drains and leaves the registry.

    Raises what made the worker unable to go on, once it is logged, and Superseded when a newer life began.
    """
    store = Store(spec.store_address(os.environ))
    try:
        await _serve(spec, store, stop)
    except Exception as error:
        expected = isinstance(error, TandemError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        # Before the registry is told: who reads there that a worker failed looks into its log.
        log.error("worker ended", worker_id=spec.config.worker_id, error=reason, exc_info=not expected)
        with contextlib.suppress(TandemError):
            # The registry may be what is away; the log has the reason too.
            await store.note_failure(spec.config.worker_id, reason)
        raise
    finally:
        await store.close()


async def _serve(spec: WorkerSpec, store: Store, stop: asyncio.Event) -> None:
    started_s = time.monotonic()
    incarnation = await _next_incarnation(store, spec.config.worker_id)
    folder = await asyncio.to_thread(_resolve, spec.model_source)
    config = replace(
        spec.config,
        incarnation=incarnation,
        model_folder=folder,
        advertise_host=advertised_host(spec.config.advertise_host),
    )
    async with _open(config, _token()) as worker:
        entry = RegisteredWorker(worker.record, os.getpid(), socket.gethostname())
        async with registered(store, entry, spec.registry_lease_s) as lease:
            log.info(
                "worker registered",
                worker_id=config.worker_id,
                incarnation=incarnation,
                start_s=round(time.monotonic() - started_s, 3),
            )
            await _until_stopped(stop, worker, lease)
            await worker.drain(spec.drain_timeout_s)


def _token() -> str:
    token = os.environ.get(CLUSTER_TOKEN_ENV)
    if not token:
        raise ConfigError(f"A worker needs the environment variable {CLUSTER_TOKEN_ENV} on its node.")
    return token


async def _end_if_stalled(worker: HostedWorker) -> None:
    """Ends the process when a thread of it hangs that can't be stopped: others can go on with its legs."""
    while True:
        await asyncio.sleep(STALL_CHECK_S)
        if worker.stalled_s() > STALL_LIMIT_S:
            log.critical("a step hangs; the process ends", worker_id=worker.record.worker_id)
            os._exit(EXIT_STALLED)
        if (reason := worker.wedged()) is not None:
            log.critical("the process ends", worker_id=worker.record.worker_id, reason=reason)
            os._exit(EXIT_STALLED)


async def _next_incarnation(store: Store, worker_id: WorkerId) -> Incarnation:
    """Waits through outages of the registry: without it nobody could be told of this worker anyway."""
    while True:
        try:
            return await store.next_incarnation(worker_id)
        except StoreUnavailable as error:
            log.warning("waiting for the registry", error=str(error))
            await asyncio.sleep(STORE_RETRY_S)


def advertised_host(host: str) -> str:
    """The address itself, or this node's own where it means all of the node's."""
    families = {"0.0.0.0": (socket.AF_INET, "10.255.255.255"), "::": (socket.AF_INET6, "fd00::1")}
    if host not in families:
        return host
    family, anywhere = families[host]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only asks the routing table.
        probe.connect((anywhere, 9))
        own = str(probe.getsockname()[0])
    return f"[{own}]" if family is socket.AF_INET6 else own


def _resolve(source: str) -> "Path":
    from engine.models.model_source import resolve_model

    return resolve_model(source)


def _open(config: WorkerConfig, token: str | None) -> AbstractAsyncContextManager[HostedWorker]:
    """Imports the worker's room only here: it brings torch with it."""
    if config.role is Role.PREFILL:
        opener = importlib.import_module("prefill_worker.service").PrefillWorker
    elif config.role is Role.DECODE:
        opener = importlib.import_module("decode_worker.service").DecodeWorker
    else:
        raise TandemError(f"No worker has the role {config.role.value}; allowed: prefill, decode")
    hosted: AbstractAsyncContextManager[HostedWorker] = opener.open(config, token)
    return hosted


async def _until_stopped(stop: asyncio.Event, worker: HostedWorker, lease: "asyncio.Task[None]") -> None:
    """Returns when told to stop; raises when the worker failed or lost its lease to a newer life."""
    stopped = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(worker.failed())
    watching = asyncio.create_task(_end_if_stalled(worker))
    try:
        await asyncio.wait({stopped, failed, lease}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (failed, lease):
            if ended.done():
                ended.result()
                raise TandemError("The worker ended without being told to.")
    finally:
        stopped.cancel()
        failed.cancel()
        watching.cancel()
        await asyncio.gather(stopped, failed, watching, return_exceptions=True)
