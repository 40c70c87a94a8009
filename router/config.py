"""Pure: what a router process is told at its start."""

from dataclasses import dataclass
from pathlib import Path

from tandem.slo import SloClass


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """One router's settings.

    `model_folder` holds tokenizer and chat template. `dispatch` names a policy of router/dispatch.py.
    `max_queued` bounds the requests waiting for a prefill worker, `max_active` the admitted ones.
    `max_replacements` bounds the failures of one sample, each of which places it anew.
    `park_requests_s` bounds how long a request waits for a worker to come (back) before it fails.
    `prefill_window_tokens` and `decode_window_legs` bound what this router has outstanding at one worker; the
    rest waits at the router, where the choice is still open. A lone leg is always let through.
    `worker_silence_s`: a worker that says nothing for so long, pings unanswered, is lost.
    `drain_timeout_s` bounds the wait for running requests at the end.
    `request_log` gets a line for each request that ended (None: off), set aside at `request_log_bytes`.
    The API key comes from TANDEM_API_KEY and the cluster token from TANDEM_CLUSTER_TOKEN, never from here.
    """

    model_folder: Path
    model_name: str
    digest: str
    slo_classes: tuple[SloClass, ...]
    default_slo_class: str
    context_tokens: int
    block_size: int = 16
    dispatch: str = "prefix_aware"
    max_queued: int = 256
    max_active: int = 1024
    max_replacements: int = 16
    request_timeout_s: float = 600.0
    park_requests_s: float = 30.0
    canary_interval_s: float = 5.0
    bind_host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_port: int = 8000
    prefill_window_tokens: int = 16_384
    decode_window_legs: int = 16
    worker_silence_s: float = 1.75
    drain_timeout_s: float = 30.0
    max_body_bytes: int = 8 * 1024 * 1024
    request_log: Path | None = None
    request_log_bytes: int = 64 * 1024 * 1024
