"""Edge: the pools of workers as Ray actors: an actor a worker, a placement group a pool, endless restarts.

Ray is driven from one thread of our own. It must be one that lives until the end, because on Linux Ray ties
the processes of a local cluster to the thread that started them: they die with us, however we die.
"""

import asyncio
import logging
import math
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import structlog

from cluster.config import ClusterConfig, PoolSection
from cluster.worker_actor import CLOSE_TIMEOUT_S, WorkerActor
from cluster.worker_host import WorkerSpec
from tandem.errors import ConfigError, NotReady
from tandem.ids import WorkerId
from tandem.worker import Role

log = structlog.get_logger(__name__)

T = TypeVar("T")

PLACEMENT_TIMEOUT_S = 30.0
TEMPORARY_FOLDER_PREFIX = "tandem-ray-"

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(slots=True)
class _Actors:
    """What we asked Ray for, and must give back."""

    handles: dict[WorkerId, Any] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)


class RayPools:
    """The actors of one cluster. All methods block at most by their bounds; none may run before `open`."""

    def __init__(self, config: ClusterConfig, thread: ThreadPoolExecutor) -> None:
        self._config = config
        self._thread = thread
        self._actors = _Actors()

    async def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Places the actors; returns when Ray has reserved their resources. Raises NotReady when it can't."""
        for role, pool in (
            (Role.PREFILL, self._config.pools.prefill),
            (Role.DECODE, self._config.pools.decode),
        ):
            members = [spec for spec in specs if spec.config.role is role]
            if members:
                await self._call(partial(self._start_pool, pool, members))

    async def drain(self) -> None:
        """Drains all workers at once, within the configured bound."""
        await self._call(self._drain_all)

    async def close(self) -> None:
        """Kills what still runs and gives the placement groups back; idempotent."""
        await self._call(self._kill_all)

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _start_pool(self, pool: PoolSection, specs: Sequence[WorkerSpec]) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": pool.num_cpus} | ({"GPU": pool.num_gpus} if pool.num_gpus else {})
        group = placement_group([dict(bundle) for _ in specs], strategy="PACK")
        self._actors.groups.append(group)
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise NotReady(
                f"Ray has no room for {len(specs)} {specs[0].config.role.value} workers with {bundle} each."
            )
        actor_class = ray.remote(WorkerActor)
        for index, spec in enumerate(specs):
            self._actors.handles[spec.config.worker_id] = actor_class.options(
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                ),
            ).remote(spec.to_json())

    def _drain_all(self) -> None:
        import ray

        bound_s = self._config.ray.drain_timeout_s + CLOSE_TIMEOUT_S
        pending = {handle.drain.remote(): name for name, handle in self._actors.handles.items()}
        if not pending:
            return
        _, late = ray.wait(list(pending), num_returns=len(pending), timeout=bound_s)
        for reference in late:
            log.warning("worker did not drain in time", worker_id=pending[reference])

    def _kill_all(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        while self._actors.handles:
            _, handle = self._actors.handles.popitem()
            ray.kill(handle, no_restart=True)
        while self._actors.groups:
            remove_placement_group(self._actors.groups.pop())


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
    with _environment({**_QUIET, **({"RAY_AUTH_MODE": "token", **secrets} if local else {})}):
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
