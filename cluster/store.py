"""Edge: the registry in Redis: who lives, which life it is, what is wanted; the only module that knows Redis.

Every call is one atomic script and takes at most CALL_TIMEOUT_S. Leases are measured on the server's clock.
Losing the server's data is harmless: workers write themselves back, and incarnations keep growing because
they are never smaller than the server's time in milliseconds.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from cluster.config_section import MOST_REPLICAS
from planner.control.load_window import RolePlacement
from tandem.errors import ConfigError, NotReady
from tandem.ids import Incarnation, WorkerId
from tandem.worker import WorkerRecord

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 1.0
MAX_REASON_CHARACTERS = 2000

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

_NEXT_INCARNATION = (
    _NOW
    + """
local last = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local mine = string.format('%.0f', math.max(last + 1, now))
redis.call('HSET', KEYS[1], ARGV[1], mine)
return mine
"""
)

_REGISTER = (
    _NOW
    + """
local last = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if last > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now + ARGV[3]) .. ' ' .. ARGV[4])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
)

_DEREGISTER = """
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
"""

_NOTE_FAILURE = """
local before = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) ')
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', tonumber(before or '0') + 1) .. ' ' .. ARGV[2])
return 1
"""

_LIVING = (
    _NOW
    + """
redis.call('SETNX', KEYS[2], ARGV[1])
local answer = {redis.call('GET', KEYS[2]), redis.call('HMGET', KEYS[3], 'version', 'prefill', 'decode')}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local expires, entry = string.match(all[i + 1], '^(%d+) (.*)$')
  if expires and tonumber(expires) > now then
    table.insert(answer, entry)
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return answer
"""
)

_DESIRE = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if ARGV[1] ~= '' and ARGV[1] ~= version then return 0 end
redis.call('HSET', KEYS[1], 'prefill', ARGV[2], 'decode', ARGV[3])
if ARGV[1] == '' then redis.call('DEL', KEYS[2]) end
return redis.call('HINCRBY', KEYS[1], 'version', 1)
"""

_LEAD = (
    _NOW
    + """
local expires, holder = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (.*)$')
if expires and tonumber(expires) > now and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], string.format('%.0f', now + ARGV[2]) .. ' ' .. ARGV[1])
return 1
"""
)

_RESIGN = """
if string.match(redis.call('GET', KEYS[1]) or '', '^%d+ (.*)$') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

_CONTROL = (
    _NOW
    + """
local expires, holder = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (.*)$')
if holder ~= ARGV[1] or tonumber(expires) <= now then return -1 end
if ARGV[3] ~= '' then
  if (redis.call('HGET', KEYS[2], 'version') or '0') ~= ARGV[3] then return -2 end
  redis.call('HSET', KEYS[2], 'prefill', ARGV[4], 'decode', ARGV[5])
  redis.call('HINCRBY', KEYS[2], 'version', 1)
end
redis.call('SET', KEYS[3], ARGV[2])
return 1
"""
)


class StoreUnavailable(NotReady):
    """The registry did not answer in time, or not with what was asked."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the registry is; the password is kept out of every text."""

    url: str
    namespace: str = "tandem"
    tls_ca: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RegisteredWorker:
    """A worker as the registry shows it; `pid` and `host` are for operators."""

    record: WorkerRecord
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Desired:
    """How many workers of each role are wanted; every change has a version of its own."""

    version: int
    placement: RolePlacement


@dataclass(frozen=True, slots=True)
class Living:
    """Who holds a lease now, and what is wanted (None when nobody said, or nothing that makes sense).

    `epoch` changes when the registry lost its data.
    """

    epoch: str
    workers: tuple[RegisteredWorker, ...]
    desired: Desired | None = None


@dataclass(frozen=True, slots=True)
class Failures:
    """How often in a row a worker failed, and what the last failure said."""

    count: int
    last_reason: str


class Controlled(Enum):
    """What became of a controller's write; values are those of the script."""

    DONE = 1
    NOT_LEADING = -1
    CHANGED_MEANWHILE = -2


_ENTRY = TypeAdapter(RegisteredWorker)


class Store:
    """A connection to the registry of one cluster.

    Every method raises StoreUnavailable while the registry is away, ConfigError when it refuses the login.
    """

    def __init__(self, address: StoreAddress) -> None:
        extra: dict[str, Any] = {}
        if address.tls_ca is not None:
            extra["ssl_ca_certs"] = address.tls_ca
        if address.password is not None:
            extra["password"] = address.password
        self._redis = Redis.from_url(
            address.url,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            # Once more at once: a pooled connection may be from before a restart of the server.
            retry=Retry(NoBackoff(), 1),
            **extra,
        )
        self._url = address.url
        # The braces keep all keys in one slot of a Redis Cluster, so that scripts may use them together.
        self._prefix = f"{{{address.namespace}}}"

    async def next_incarnation(self, worker_id: WorkerId) -> Incarnation:
        """Starts a new life of a worker: a number greater than all before it."""
        return Incarnation(int(await self._run(_NEXT_INCARNATION, ["incarnations"], [worker_id])))

    async def register(self, worker: RegisteredWorker, lease_s: float) -> bool:
        """Takes or renews the lease; False when a newer life of the worker has begun."""
        record = worker.record
        lease_ms, entry = round(lease_s * 1000), _ENTRY.dump_json(worker)
        arguments = (record.worker_id, record.incarnation, lease_ms, entry)
        return bool(await self._run(_REGISTER, ["workers", "incarnations", "failures"], arguments))

    async def deregister(self, record: WorkerRecord) -> None:
        """Gives the lease back at once; a newer life's lease is left alone."""
        await self._run(_DEREGISTER, ["workers", "incarnations"], [record.worker_id, record.incarnation])

    async def note_failure(self, worker_id: WorkerId, reason: str) -> None:
        """Notes that a life of a worker ended by a fault; forgotten once it registers again."""
        await self._run(_NOTE_FAILURE, ["failures"], [worker_id, reason[:MAX_REASON_CHARACTERS]])

    async def failures(self) -> dict[WorkerId, Failures]:
        """Workers whose last lives ended by a fault before they could register."""
        pairs = await self._run("return redis.call('HGETALL', KEYS[1])", ["failures"], [])
        texts = [item.decode(errors="replace") for item in pairs]
        found: dict[WorkerId, Failures] = {}
        for worker_id, text in zip(texts[::2], texts[1::2], strict=True):
            count, _, reason = text.partition(" ")
            found[WorkerId(worker_id)] = Failures(int(count), reason)
        return found

    async def living(self) -> Living:
        """Everyone who holds a lease, sorted by id."""
        keys = ["workers", "epoch", "desired"]
        epoch, desired, *entries = await self._run(_LIVING, keys, [secrets.token_hex(8)])
        found = [worker for worker in map(_parse, entries) if worker is not None]
        return Living(
            epoch.decode(errors="replace"),
            tuple(sorted(found, key=lambda worker: worker.record.worker_id)),
            _desired(desired),
        )

    async def desired(self) -> Desired | None:
        """How many workers of each role are wanted; None when nobody said."""
        return (await self.living()).desired

    async def set_desired(self, placement: RolePlacement, expected_version: int | None = None) -> bool:
        """Notes what is wanted; False when the version is no longer the expected one (0: nobody said yet).

        Without an expected version it is a new beginning: the controller's memory is dropped too.
        """
        expected = "" if expected_version is None else expected_version
        arguments = (expected, placement.prefill, placement.decode)
        return bool(await self._run(_DESIRE, ["desired", "controller-memory"], arguments))

    async def lead(self, token: str, lease_s: float) -> bool:
        """Takes or renews the lease of the one controller that acts; False while another one holds it."""
        return bool(await self._run(_LEAD, ["controller"], [token, round(lease_s * 1000)]))

    async def resign(self, token: str) -> None:
        """Gives that lease back at once; another one's is left alone."""
        await self._run(_RESIGN, ["controller"], [token])

    async def controller_memory(self) -> bytes | None:
        """What the controller remembered last, as it wrote it; None when it has no memory."""
        found = await self._run("return redis.call('GET', KEYS[1])", ["controller-memory"], [])
        return None if found is None else bytes(found)

    async def control(self, token: str, memory: bytes, change: Desired | None) -> Controlled:
        """Keeps the controller's memory, and with a change what is wanted from now on: both or neither.

        `change.version` is the version that it replaces. Only who holds the lease may do that.
        """
        wanted = ("", 0, 0)
        if change is not None:
            wanted = (str(change.version), change.placement.prefill, change.placement.decode)
        keys = ["controller", "desired", "controller-memory"]
        return Controlled(int(await self._run(_CONTROL, keys, [token, memory, *wanted])))

    async def close(self) -> None:
        """Closes the connections; idempotent."""
        await self._redis.aclose()

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        full_keys = [f"{self._prefix}:{key}" for key in keys]
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._redis.eval(script, len(full_keys), *full_keys, *arguments)
        except AuthenticationError as error:
            raise ConfigError(
                f"redis.url: {self._url} refuses the login; set TANDEM_REDIS_PASSWORD to its password"
            ) from error
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"The registry at {self._url} cannot be reached: {error}") from error


def _desired(fields: Sequence[bytes | None]) -> Desired | None:
    """None where nothing is written, or something that no cluster can be."""
    try:
        version, prefill, decode = (int(field or b"0") for field in fields)
    except ValueError:
        log.warning("unreadable desired placement")
        return None
    placement = RolePlacement(prefill, decode)
    sensible = placement.valid and max(prefill, decode) <= MOST_REPLICAS
    return Desired(version, placement) if version and sensible else None


def _parse(entry: bytes) -> RegisteredWorker | None:
    """None for an entry that some other version wrote and we cannot read."""
    try:
        return _ENTRY.validate_json(entry)
    except ValidationError as error:
        log.warning("unreadable registry entry", faults=error.error_count())
        return None
