"""Edge: starts one worker from the command line, without Ray or Redis."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from engine.models.model_source import resolve_model
from engine.worker_process.worker import Worker
from tandem.errors import ConfigError, TandemError
from tandem.grpc_edge import CLUSTER_TOKEN_ENV
from tandem.ids import Incarnation, WorkerId
from tandem.logs import configure_logging
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, TlsConfig, WorkerConfig

OpenWorker = Callable[[WorkerConfig, str | None], AbstractAsyncContextManager[Worker[Any]]]

DRAIN_S = 20.0
DEFAULT_OVERLAP_MIN_TOKENS = 256


def run_by_hand(role: Role, open_worker: OpenWorker, arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, serves until SIGINT or SIGTERM, drains; returns the exit code."""
    options = _parser(role).parse_args(arguments)
    configure_logging()
    try:
        _require_token_beyond_loopback(options.bind_host)
        config = WorkerConfig(
            worker_id=WorkerId(options.worker_id),
            incarnation=Incarnation(options.incarnation),
            role=role,
            model_folder=resolve_model(options.model),
            model_name=options.model,
            pool_blocks=options.pool_blocks,
            device=options.device,
            attention=options.attention,
            dtype=options.dtype,
            weights_dtype=None if options.weights_dtype == "auto" else options.weights_dtype,
            threads=options.threads or len(options.cores) or os.cpu_count() or 1,
            cores=options.cores,
            bind_host=options.bind_host,
            advertise_host=options.advertise_host or options.bind_host,
            port=options.port,
            metrics_port=options.metrics_port,
            transports=tuple(options.transports.split(",")),
            overlap_min_tokens=options.overlap_min_tokens or None,
            kv_arena=options.kv_arena,
            prefix_cache=not options.no_prefix_cache,
            codec=options.codec,
            codec_thresholds=options.codec_thresholds,
            tls=None if options.tls is None else TlsConfig(*options.tls),
            kv_dtype=options.kv_dtype,
            kv_selection=_kv_selection(options),
        )
        asyncio.run(_serve(open_worker, config))
    except (TandemError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _kv_selection(options: argparse.Namespace) -> KvSelectionConfig | None:
    if options.quest_pages is not None and options.morph_tokens is not None:
        raise ConfigError("--quest-pages and --morph-tokens do not go together.")
    if options.quest_pages is not None:
        return KvSelectionConfig("quest", pages=options.quest_pages)
    if options.morph_tokens is not None:
        return KvSelectionConfig("morph", budget_tokens=options.morph_tokens)
    return None


def _require_token_beyond_loopback(bind_host: str) -> None:
    if bind_host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get(CLUSTER_TOKEN_ENV):
        raise ConfigError(f"--bind-host {bind_host} needs the environment variable {CLUSTER_TOKEN_ENV}.")


async def _serve(open_worker: OpenWorker, config: WorkerConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_worker(config, os.environ.get(CLUSTER_TOKEN_ENV)) as worker:
        print(f"{config.worker_id} {worker.record.address} {worker.record.digest}", flush=True)
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(worker.failed())
        await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        failing.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        (failure,) = await asyncio.gather(failing, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure
        await worker.drain(DRAIN_S)


def _parser(role: Role) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {role.value}_worker",
        description=f"Serves one {role.value} worker; prints its id, address and digest when it is ready.",
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--worker-id", default=f"{role.value}-0")
    parser.add_argument("--incarnation", type=int, default=1)
    parser.add_argument(
        "--pool-blocks", type=int, default=1024, help="KV blocks of 16 tokens; 0 on a GPU: what fits"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--attention", default="auto", help="on a GPU: auto, flashinfer, triton or sdpa")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--weights-dtype", default="auto", choices=("auto", "int8"), help="of matrix products; auto: --dtype"
    )
    parser.add_argument("--kv-dtype", choices=("int8",), help="how KV is stored; default: as --dtype")
    parser.add_argument(
        "--quest-pages", type=int, metavar="N", help="decode: read N blocks of KV a token; default: all"
    )
    parser.add_argument(
        "--morph-tokens", type=int, metavar="N", help="decode: keep KV of N tokens a sample; default: of all"
    )
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument(
        "--cores", type=_cores, default=(), metavar="N,N", help="that the worker keeps to; default: any"
    )
    parser.add_argument("--bind-host", default="127.0.0.1")
    parser.add_argument("--advertise-host", help="address for others; default: the bind host")
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose")
    parser.add_argument("--metrics-port", type=int, help="Prometheus; default: none")
    parser.add_argument("--transports", default="shm,tcp", help="best first")
    parser.add_argument(
        "--kv-arena", type=Path, metavar="FILE", help="shared by the host's pools, in a tmpfs or hugetlbfs"
    )
    parser.add_argument("--no-prefix-cache", action="store_true", help="needed to give KV away in an arena")
    parser.add_argument("--codec", default="identity", help="how KV is written: identity, fp8, int8 or oaken")
    parser.add_argument("--codec-thresholds", type=Path, help="file that oaken needs")
    parser.add_argument(
        "--tls",
        nargs=3,
        type=Path,
        metavar=("CERT", "KEY", "CA"),
        help="PEM files; encrypts KV that moves over tcp (default: in the clear)",
    )
    parser.add_argument(
        "--overlap-min-tokens",
        type=int,
        default=DEFAULT_OVERLAP_MIN_TOKENS,
        metavar="N",
        help=f"prefill: KV of prompts of N tokens or more moves while they are read "
        f"({DEFAULT_OVERLAP_MIN_TOKENS}); 0: never",
    )
    return parser


def _cores(text: str) -> tuple[int, ...]:
    """Whole numbers divided by commas."""
    return tuple(int(part) for part in text.split(","))
