"""Edge: puts a controller together from cluster.yaml, and the hand that carries out what it wants."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import structlog

from cluster.config import REDIS_PASSWORD_ENV, ClusterConfig
from cluster.controller.load_source import RouterLoads
from cluster.controller.log_file import open_log
from cluster.controller.loop import Brain, ControllerLoop, Senses, dry_run
from cluster.controller.metrics import ControllerMetrics
from cluster.controller.rules import controller_rules
from cluster.store import Store, StoreAddress
from planner.control.role_capacity import CapacityOf
from tandem.errors import ConfigError
from tandem.metrics_server import metrics_served

log = structlog.get_logger(__name__)


def read_brain(config: ClusterConfig) -> Brain:
    """Reads the plan that says what a worker can do. Raises ConfigError, InvalidRequest."""
    from planner.control.replay import plan_capacity
    from planner.plan.file import PlanFile
    from planner.plan.run import read_problem
    from planner.yaml_document import load_section

    section = config.controller
    if section.plan is None:
        raise ConfigError("controller.plan: a controller needs one; allowed: the path of a plan.yaml")
    path = Path(section.plan).expanduser()
    problem = read_problem(load_section(path, PlanFile), path.parent)
    rules = controller_rules(config, problem.slo.attainment)
    capacity_of: CapacityOf = plan_capacity(problem)
    brain = Brain(rules, capacity_of, section.window_s)
    brain.controller()
    return brain


async def run_controller(
    config: ClusterConfig,
    brain: Brain,
    address: StoreAddress,
    routers: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Controls until cancelled; a dry run says what it would do, to `say`, and writes nothing.

    Raises ConfigError for a log or metrics port that cannot be had, and for a refused login.
    """
    async with RouterLoads(routers) as load:
        if config.controller.dry_run:
            await dry_run(brain, load, say)
            return
        store = Store(address)
        try:
            with _senses(config, brain, load) as senses:
                await ControllerLoop(brain, senses, store, config.leases.registry_s).run()
        finally:
            await store.close()


async def control_cluster(config: ClusterConfig, routers: Sequence[str], say: Callable[[str], None]) -> int:
    """A controller by itself, beside a cluster that runs: until cancelled, which is its end (0).

    Raises ConfigError, InvalidRequest for a configuration that nobody could control by.
    """
    brain, redis = await asyncio.to_thread(read_brain, config), config.redis
    if redis.url == "embedded" and not config.controller.dry_run:
        raise ConfigError(
            "redis.url: the embedded one is known to its `tandem up` alone; allowed: --dry-run, or "
            "redis://host:port/db, rediss://host:port/db"
        )
    password = os.environ.get(REDIS_PASSWORD_ENV)
    address = StoreAddress(redis.url, redis.namespace, redis.tls_ca, password)
    try:
        await run_controller(config, brain, address, routers, say)
    except asyncio.CancelledError:
        return 0
    return 0


@contextmanager
def _senses(config: ClusterConfig, brain: Brain, load: RouterLoads) -> Iterator[Senses]:
    section, metrics = config.controller, ControllerMetrics()
    path = None if section.log is None else Path(section.log).expanduser()
    with open_log(path, int(section.log_bytes), brain.rules) as notes, ExitStack() as stack:
        served = metrics_served(metrics.registry, config.router.bind_host, section.metrics_port)
        try:
            stack.enter_context(served)
        except OSError as error:
            raise ConfigError(
                f"controller.metrics_port: {section.metrics_port} cannot be bound ({error.strerror})"
            ) from error
        yield Senses(load, notes, metrics)


@asynccontextmanager
async def in_background(*parts: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Runs these until the block ends. One that fails is logged, and serving goes on without it."""
    async with AsyncExitStack() as stack:
        for part in parts:
            stack.push_async_callback(_cancel, asyncio.create_task(_guarded(part)))
        yield


async def _guarded(part: Coroutine[object, object, None]) -> None:
    try:
        await part
    except Exception:
        log.exception("the placement of workers stays as it is")


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
