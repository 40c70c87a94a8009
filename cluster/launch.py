"""Edge: starts a whole cluster in order, and stops it in the opposite order; nothing outlives the block."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster import readiness
from cluster.child_process import tail
from cluster.config import REDIS_PASSWORD_ENV, ClusterConfig, RouterSection
from cluster.controller.assembly import in_background, read_brain, run_controller
from cluster.controller.reconciler import Reconciler
from cluster.controller.rules import interchangeable
from cluster.embedded_store import embedded_store
from cluster.model_facts import read_model_facts
from cluster.plan import (
    ModelFacts,
    kv_dtype,
    router_config,
    thresholds_path,
    weights_dtype,
    with_replicas,
    worker_configs,
)
from cluster.progress import LaunchProgress, Phase
from cluster.ray_pools import RayPools, ray_pools
from cluster.router_host import BoundPorts, RouterSpec
from cluster.router_keeper import RouterKeeper
from cluster.run_folder import RunFolder
from cluster.store import RegisteredWorker, Store, StoreAddress
from cluster.worker_host import WorkerSpec
from engine.cpu.pinning import check_cores
from engine.models.model_source import resolve_model
from planner.control.load_window import RolePlacement
from tandem.errors import ConfigError, NotReady
from tandem.grpc_edge import CLUSTER_TOKEN_ENV
from tandem.ids import WorkerId
from tandem.worker_config import WorkerConfig

CLOSE_ROUTER_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that serves. Addresses are host:port; `phases_s`: how long each part of the start took."""

    grpc_address: str
    http_address: str
    run_folder: Path
    phases_s: Mapping[Phase, float]
    store: Store
    registry: StoreAddress
    router: RouterKeeper

    async def workers(self) -> dict[WorkerId, RegisteredWorker]:
        """Who is registered now, with process ids. Raises StoreUnavailable."""
        living = await self.store.living()
        return {worker.record.worker_id: worker for worker in living.workers}

    async def until_failure(self) -> NotReady:
        """Waits until the router can't be kept running (Ray keeps the workers), and says why."""
        return await self.router.failed()


@asynccontextmanager
async def running_cluster(
    config: ClusterConfig,
    *,
    progress: LaunchProgress | None = None,
    say: Callable[[str], None] = print,
) -> AsyncIterator[RunningCluster]:
    """Starts everything, yields when requests can be served, drains and stops everything at the end.

    `say` gets what a controller would change in a dry run.

    Must run in the main thread (see ChildProcess). Raises ConfigError, ModelError, or NotReady, which says
    what is not ready and why. Cancelled before it serves, it stops everything without draining.
    """
    brain = await asyncio.to_thread(read_brain, config) if config.controller.enabled else None
    launch = _Launch(config, progress or LaunchProgress())
    async with AsyncExitStack() as stack:
        cluster = await launch.start(stack)
        parts = [launch.reconciler(cluster.store).run()]
        if brain is not None:
            parts.append(run_controller(config, brain, cluster.registry, [cluster.grpc_address], say))
        try:
            async with in_background(*parts):
                yield cluster
        finally:
            await launch.drain()


class _Launch:
    """One launch: its parts, in the order of their making."""

    def __init__(self, config: ClusterConfig, progress: LaunchProgress) -> None:
        self._config = config
        self._progress = progress
        self._folder = RunFolder.create()
        self._phases_s: dict[Phase, float] = {}
        self._deadline_s = time.monotonic() + config.ray.start_timeout_s
        self._secrets = _secrets(config)
        self._router: RouterKeeper | None = None
        self._pools: RayPools | None = None
        self._specs: Callable[[RolePlacement], tuple[WorkerSpec, ...]] | None = None

    async def start(self, stack: AsyncExitStack) -> RunningCluster:
        """The model beside registry and Ray; then workers beside the router; then the proof by a hand-off."""
        _check_ports(self._config.router)
        _check_cores(self._config)
        reading = asyncio.create_task(self._timed(Phase.MODEL, asyncio.to_thread(self._read_model)))
        stack.push_async_callback(_cancel, reading)
        address = await self._timed(Phase.REGISTRY, self._open_registry(stack))
        store = Store(address)
        stack.push_async_callback(store.close)
        await store.living()
        if reading.done():
            # A wrong model is said at once, not after Ray's start.
            reading.result()
        self._pools = await self._timed(
            Phase.RAY, stack.enter_async_context(ray_pools(self._config, self._secrets))
        )
        facts = await reading
        self._specs = partial(self._worker_specs, facts, address)
        starting = asyncio.create_task(
            self._timed(Phase.WORKERS, self._start_workers(store, self._specs(self._placement)))
        )
        stack.push_async_callback(_cancel, starting)
        router, ports = await self._timed(Phase.ROUTER, self._start_router(stack, facts, address))
        await starting
        host = _reachable(self._config.router.bind_host)
        grpc_address, http_address = f"{host}:{ports.grpc_port}", f"{host}:{ports.http_port}"
        await self._timed(Phase.PROOF, readiness.wait_for_router(router, grpc_address, self._left_s()))
        return RunningCluster(
            grpc_address, http_address, self._folder.path, self._phases_s, store, address, router
        )

    async def drain(self) -> None:
        """Router first, so that nothing new comes; then the workers."""
        if self._router is not None:
            await self._router.stop(self._config.ray.drain_timeout_s + CLOSE_ROUTER_S)
        if self._pools is not None:
            await self._pools.drain()

    def reconciler(self, store: Store) -> Reconciler:
        """What changes the workers from now on. Raises NotReady before the start."""
        if self._pools is None or self._specs is None:
            raise NotReady("The workers were not started.")
        return Reconciler(
            store,
            self._pools,
            self._specs,
            self._placement,
            interchangeable=interchangeable(self._config),
            start_timeout_s=self._config.ray.start_timeout_s,
        )

    @property
    def _placement(self) -> RolePlacement:
        pools = self._config.pools
        return RolePlacement(pools.prefill.replicas, pools.decode.replicas)

    async def _open_registry(self, stack: AsyncExitStack) -> StoreAddress:
        redis = self._config.redis
        if redis.url != "embedded":
            return StoreAddress(
                redis.url, redis.namespace, redis.tls_ca, self._secrets.get(REDIS_PASSWORD_ENV)
            )
        password = self._secrets[REDIS_PASSWORD_ENV]
        server = await stack.enter_async_context(
            embedded_store(self._folder.log("valkey"), password=password)
        )
        return StoreAddress(server.url, redis.namespace, None, password)

    def _read_model(self) -> ModelFacts:
        folder = resolve_model(self._config.model.source, self._progress.model_bytes)
        config = self._config
        return read_model_facts(
            *(folder, config.model.dtype, config.block_size, config.workers.codec, thresholds_path(config)),
            stored_as=kv_dtype(config),
            weights_dtype=weights_dtype(config),
        )

    async def _start_workers(self, store: Store, specs: tuple[WorkerSpec, ...]) -> None:
        if self._pools is None:
            raise NotReady("Ray is not up.")
        await store.set_desired(self._placement)
        await self._pools.start(specs)
        await readiness.wait_for_workers(
            store,
            [spec.config.worker_id for spec in specs],
            self._progress.worker_registered,
            self._left_s(),
            lambda worker_id: tail(self._folder.log(worker_id)),
        )

    async def _start_router(
        self, stack: AsyncExitStack, facts: ModelFacts, address: StoreAddress
    ) -> tuple[RouterKeeper, BoundPorts]:
        spec = RouterSpec(
            router_config(self._config, facts),
            address.url,
            address.namespace,
            address.tls_ca,
            self._config.leases.registry_s,
        )
        router = RouterKeeper(spec, self._folder.log("router"), self._secrets)
        self._router = router
        stack.push_async_callback(router.stop, CLOSE_ROUTER_S)
        return router, await router.start(self._left_s())

    def _worker_specs(
        self, facts: ModelFacts, address: StoreAddress, placement: RolePlacement
    ) -> tuple[WorkerSpec, ...]:
        workers = worker_configs(with_replicas(self._config, placement), facts, os.cpu_count() or 1)
        return tuple(self._worker_spec(worker, address) for worker in workers)

    def _worker_spec(self, worker: WorkerConfig, address: StoreAddress) -> WorkerSpec:
        local = self._config.ray.address == "local"
        return WorkerSpec(
            config=worker,
            model_source=_absolute(self._config.model.source),
            store_url=address.url,
            store_namespace=address.namespace,
            store_tls_ca=address.tls_ca,
            registry_lease_s=self._config.leases.registry_s,
            drain_timeout_s=self._config.ray.drain_timeout_s,
            log_file=str(self._folder.log(worker.worker_id)) if local else "",
        )

    def _left_s(self) -> float:
        return max(0.1, self._deadline_s - time.monotonic())

    async def _timed(self, phase: Phase, work: Awaitable[T]) -> T:
        started_s = time.monotonic()
        self._progress.began(phase)
        result = await work
        self._phases_s[phase] = time.monotonic() - started_s
        self._progress.ended(phase, self._phases_s[phase])
        return result


def _secrets(config: ClusterConfig) -> dict[str, str]:
    """What router and workers find in their environment; made up where the operator gave none.

    Raises ConfigError when workers elsewhere could not know a made-up one.
    """
    token = os.environ.get(CLUSTER_TOKEN_ENV)
    if not token and config.ray.address != "local":
        raise ConfigError(
            f"ray.address: {config.ray.address} needs the environment variable {CLUSTER_TOKEN_ENV}, here and "
            "on the nodes of that Ray"
        )
    found = {CLUSTER_TOKEN_ENV: token or secrets.token_urlsafe(32)}
    if config.redis.url == "embedded":
        found[REDIS_PASSWORD_ENV] = secrets.token_urlsafe(32)
    elif os.environ.get(REDIS_PASSWORD_ENV):
        found[REDIS_PASSWORD_ENV] = os.environ[REDIS_PASSWORD_ENV]
    return found


def _check_ports(router: RouterSection) -> None:
    """Raises ConfigError before anything is started for nothing."""
    for key, port in (("grpc_port", router.grpc_port), ("http_port", router.http_port)):
        family = socket.AF_INET6 if ":" in router.bind_host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((router.bind_host, port))
            except OSError as error:
                raise ConfigError(
                    f"router.{key}: {router.bind_host}:{port} cannot be bound ({error.strerror}); allowed: a "
                    "port that nobody uses, or 0 to let the system choose"
                ) from error


def _check_cores(config: ClusterConfig) -> None:
    """Raises ConfigError for a core that no worker here can run on; nodes of another Ray check their own."""
    if config.ray.address == "local":
        for name, pool in (("prefill", config.pools.prefill), ("decode", config.pools.decode)):
            try:
                check_cores(pool.cores or ())
            except ConfigError as error:
                raise ConfigError(f"pools.{name}.{error}") from error


def _reachable(bind_host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(bind_host, bind_host)


def _absolute(source: str) -> str:
    """Workers may have another working directory."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


async def _cancel(task: "asyncio.Task[T]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
