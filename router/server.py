"""Edge: one router process: both front doors over one core, from start to drained end."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog
import uvicorn

from engine.models.tokenizer import Tokenizer
from router.canary import run_canaries
from router.config import RouterConfig
from router.grpc_service import GrpcDoor
from router.intake import Intake
from router.membership import Membership
from router.openai_http import OpenAiDoor
from router.request_log import request_log
from router.served_model import ServedModel
from router.service_core import RouterCore
from tandem.grpc_edge import API_KEY_ENV, CLUSTER_TOKEN_ENV

log = structlog.get_logger(__name__)

GRPC_GRACE_S = 1.0
HTTP_GRACE_S = 2


@dataclass(frozen=True, slots=True)
class RouterPorts:
    """Where the front doors listen."""

    grpc_port: int
    http_port: int


class _HttpServer(uvicorn.Server):
    """Leaves signals to whoever runs the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


async def serve_router(
    config: RouterConfig,
    membership: Membership,
    stop: asyncio.Event,
    on_started: Callable[[RouterPorts], None] | None = None,
) -> None:
    """Serves until `stop` is set, then drains: takes no more requests, waits (bounded) for the running ones.

    `on_started` is told the bound ports. Raises OSError when a port is taken, ModelError or ConfigError when
    the configuration can't be served.
    """
    tokenizer = Tokenizer.load(config.model_folder)
    token = os.environ.get(CLUSTER_TOKEN_ENV) or None
    async with request_log(config.request_log, config.request_log_bytes, time.monotonic) as note_end:
        core = RouterCore(config, tokenizer, membership, token, time.monotonic, note_end)
        await _serve(core, tokenizer, stop, on_started)
    log.info("router stopped")


async def _serve(
    core: RouterCore,
    tokenizer: Tokenizer,
    stop: asyncio.Event,
    on_started: Callable[[RouterPorts], None] | None,
) -> None:
    config, api_key = core.config, os.environ.get(API_KEY_ENV) or None
    intake = Intake(tokenizer, _served_model(config, tokenizer), core.clock)
    grpc_door = GrpcDoor(core, intake, tokenizer, api_key)
    with _listening(config.bind_host, config.http_port) as listener:
        grpc_port = await grpc_door.start(config.bind_host, config.grpc_port)
        http = _HttpServer(_http_config(OpenAiDoor(core, intake, tokenizer, api_key)))
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(core.run()),
                tasks.create_task(run_canaries(core)),
                tasks.create_task(grpc_door.follow_readiness()),
            ]
            serving = tasks.create_task(http.serve(sockets=[listener]))
            ports = RouterPorts(grpc_port, listener.getsockname()[1])
            log.info("router serves", grpc_port=ports.grpc_port, http_port=ports.http_port)
            if on_started is not None:
                on_started(ports)
            try:
                await stop.wait()
                await core.drain(config.drain_timeout_s)
            finally:
                http.should_exit = True
                await grpc_door.stop(GRPC_GRACE_S)
                await asyncio.wait([serving], timeout=2 * HTTP_GRACE_S)
                for task in (*background, serving):
                    task.cancel()


def _served_model(config: RouterConfig, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name=config.model_name,
        context_tokens=config.context_tokens,
        vocabulary_tokens=tokenizer.vocabulary_tokens,
        slo_classes={slo.name: slo for slo in config.slo_classes},
        default_slo_class=config.default_slo_class,
        request_timeout_s=config.request_timeout_s,
    )


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, so that the port is known before the server runs."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it a token waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _http_config(door: OpenAiDoor) -> uvicorn.Config:
    return uvicorn.Config(
        door,
        http="httptools",
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=HTTP_GRACE_S,
    )
