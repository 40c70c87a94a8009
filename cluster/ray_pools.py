"""Edge: the pools of workers as Ray actors: a placement group and an actor a worker, endless restarts.

Ray is driven from one thread of our own. It must be one that lives until the end, because on Linux Ray ties
the processes of a local cluster to the thread that started them: they die with us, however we die.
"""

import asyncio
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import structlog

from cluster.config import ClusterConfig
from cluster.config_pools import PoolSection
from cluster.worker_actor import CLOSE_TIMEOUT_S, WorkerActor
from cluster.worker_host import WorkerSpec
from tandem.errors import ConfigError, NotReady
from tandem.ids import WorkerId
from tandem.worker import Role

log = structlog.get_logger(__name__)

T = TypeVar("T")

PLACEMENT_TIMEOUT_S = 30.0
DRAIN_POLL_S = 0.2
TEMPORARY_FOLDER_PREFIX = "tandem-ray-"

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_PRIORITY = {"RAY_worker_niceness": "0"}
"""Of the workers of a local Ray: by its default of 15 any other busy process takes their cores."""


class RayPools:
    """The actors of one cluster, by worker, each on resources of its own that Ray has reserved.

    All methods block at most by their bounds; none may run before Ray is connected.
    """

    def __init__(self, config: ClusterConfig, thread: ThreadPoolExecutor) -> None:
        self._config = config
        self._thread = thread
        self._handles: dict[WorkerId, Any] = {}
        self._roles: dict[WorkerId, Role] = {}
        self._places: dict[WorkerId, Any] = {}

    @property
    def running(self) -> Mapping[WorkerId, Role]:
        """The workers that were started and not removed."""
        return self._roles

    async def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Places workers; returns when Ray has reserved resources for all. Raises NotReady when it can't."""
        await self._call(partial(self._reserve, specs))
        for spec in specs:
            await self._call(partial(self._place, spec))

    async def replace(self, worker_id: WorkerId, spec: WorkerSpec) -> None:
        """Drains a worker and starts another one on its resources."""
        await self._drain(worker_id)
        await self._call(partial(self._take_over, worker_id, spec))

    async def remove(self, worker_id: WorkerId) -> None:
        """Drains a worker and gives its resources back."""
        await self._drain(worker_id)
        await self._call(partial(self._kill, worker_id))

    async def drain(self) -> None:
        """Drains all workers at once, within the configured bound."""
        await asyncio.gather(*(self._drain(worker_id) for worker_id in self._handles))

    async def close(self) -> None:
        """Kills what still runs and gives all resources back; idempotent."""
        for worker_id in list(self._places):
            await self._call(partial(self._kill, worker_id))

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _drain(self, worker_id: WorkerId) -> None:
        """Asks often and briefly, so that Ray's thread is free for others meanwhile."""
        import ray

        pending = [await self._call(self._handles[worker_id].drain.remote)]
        try:
            async with asyncio.timeout(self._config.ray.drain_timeout_s + CLOSE_TIMEOUT_S):
                while pending:
                    _, pending = await self._call(partial(ray.wait, pending, timeout=DRAIN_POLL_S))
        except TimeoutError:
            log.warning("worker did not drain in time", worker_id=worker_id)

    def _pool(self, role: Role) -> PoolSection:
        return self._config.pools.prefill if role is Role.PREFILL else self._config.pools.decode

    def _reserve(self, specs: Sequence[WorkerSpec]) -> None:
        from ray.util.placement_group import placement_group

        deadline_s = time.monotonic() + PLACEMENT_TIMEOUT_S
        for spec in specs:
            pool = self._pool(spec.config.role)
            bundle = {"CPU": pool.num_cpus} | ({"GPU": pool.num_gpus} if pool.num_gpus else {})
            self._places[spec.config.worker_id] = placement_group([bundle], strategy="PACK")
        for spec in specs:
            place = self._places[spec.config.worker_id]
            if not place.wait(max(0.0, deadline_s - time.monotonic())):
                self._release(specs)
                raise NotReady(
                    f"Ray has no room for {spec.config.worker_id} beside the others: it needs "
                    f"{place.bundle_specs[0]}."
                )

    def _release(self, specs: Sequence[WorkerSpec]) -> None:
        for spec in specs:
            self._kill(spec.config.worker_id)

    def _place(self, spec: WorkerSpec) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        worker_id, pool = spec.config.worker_id, self._pool(spec.config.role)
        self._roles[worker_id] = spec.config.role
        self._handles[worker_id] = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._places[worker_id]),
            )
            .remote(spec.to_json())
        )

    def _take_over(self, worker_id: WorkerId, spec: WorkerSpec) -> None:
        place = self._places.pop(worker_id)
        self._places[spec.config.worker_id] = place
        self._kill(worker_id)
        self._place(spec)

    def _kill(self, worker_id: WorkerId) -> None:
        """Ends the worker's process, if it has one, and gives back the resources that are still its own."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._roles.pop(worker_id, None)
        handle = self._handles.pop(worker_id, None)
        if handle is not None:
            ray.kill(handle, no_restart=True)
        place = self._places.pop(worker_id, None)
        if place is not None:
            remove_placement_group(place)


@asynccontextmanager
async def ray_pools(config: ClusterConfig, secrets: Mapping[str, str]) -> AsyncIterator[RayPools]:
    """Joins or starts Ray; at the end kills the workers that still run, and stops the Ray that it started.

    `secrets` are put into the environment that a local Ray's workers inherit, not into Ray's own metadata,
    which it logs. Nodes of another Ray must have them in their environment already.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray") as thread:
        loop = asyncio.get_running_loop()
        with _temporary_folder(config) as folder:
            starting = loop.run_in_executor(thread, _connect, config, secrets, folder)
            try:
                # Shielded: Ray cannot be interrupted half way, only stopped once it is up.
                await asyncio.shield(starting)
                pools = RayPools(config, thread)
                try:
                    yield pools
                finally:
                    await pools.close()
            finally:
                await asyncio.wait({starting})
                await loop.run_in_executor(thread, _disconnect)


def _connect(config: ClusterConfig, secrets: Mapping[str, str], folder: str) -> None:
    local = config.ray.address == "local"
    with _environment({**_QUIET, **({"RAY_AUTH_MODE": "token", **_PRIORITY, **secrets} if local else {})}):
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        namespace = config.redis.namespace
        try:
            if local:
                ray.init(address="local", namespace=namespace, **_local_settings(config, folder))
            else:
                ray.init(
                    address=config.ray.address,
                    namespace=namespace,
                    log_to_driver=False,
                    configure_logging=False,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"ray.address: {config.ray.address}: {error}") from error


def _local_settings(config: ClusterConfig, folder: str) -> dict[str, Any]:
    pools: tuple[PoolSection, ...] = (config.pools.prefill, config.pools.decode)
    wanted_cpus = sum(pool.replicas * pool.num_cpus for pool in pools)
    wanted_cpus += config.most_added_workers * max(pool.num_cpus for pool in pools)
    wants_gpus = any(pool.num_gpus for pool in pools)
    return {
        "num_cpus": max(os.cpu_count() or 1, math.ceil(wanted_cpus)),
        "num_gpus": None if wants_gpus else 0,
        "object_store_memory": int(config.ray.object_store_memory),
        "include_dashboard": False,
        "log_to_driver": False,
        "configure_logging": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }


def _disconnect() -> None:
    import ray

    ray.shutdown()


@contextmanager
def _temporary_folder(config: ClusterConfig) -> Iterator[str]:
    """Ray's own folder, in a short path since it holds Unix sockets; empty for a Ray that runs already."""
    if config.ray.address != "local":
        yield ""
        return
    _sweep()
    folder = tempfile.mkdtemp(prefix=f"{TEMPORARY_FOLDER_PREFIX}{os.getpid()}-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Removes what launches left that were killed; their process ids are in the names."""
    for left in Path(tempfile.gettempdir()).glob(f"{TEMPORARY_FOLDER_PREFIX}*"):
        owner = left.name.removeprefix(TEMPORARY_FOLDER_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process while child processes are started, then puts the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
