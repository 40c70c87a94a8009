"""Starts a real cluster with `tandem up`, and looks for what it leaves behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import yaml

from tandem.v1 import cluster_pb2, cluster_pb2_grpc

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listener(address: str) -> psutil.Process:
    """The process that listens on host:port."""
    port = int(address.rsplit(":", 1)[1])
    for connection in psutil.net_connections(kind="tcp"):
        local = connection.laddr
        if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise LookupError(f"nobody listens on {address}")


def shared_memory_segments() -> set[str]:
    """Names under /dev/shm."""
    return set(os.listdir("/dev/shm"))


@dataclass
class LiveCluster:
    """A running `tandem up`."""

    process: subprocess.Popen[bytes]
    grpc_address: str
    http_address: str
    log: Path

    def status(self) -> cluster_pb2.StatusResponse:
        """The router's view, over gRPC."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            return stub.Status(cluster_pb2.StatusRequest(), timeout=5.0)

    def worker_pid(self, worker_id: str) -> int:
        """The process that listens on the worker's address."""
        addresses = {w.worker.worker_id: w.worker.address for w in self.status().workers}
        return listener(addresses[worker_id]).pid

    def descendants(self) -> list[psutil.Process]:
        """All processes started by the cluster that still run."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_until_blocks_are_accounted(self, timeout_s: float = 10.0) -> None:
        """Waits until no worker has allocated blocks or work; fails with the loads otherwise."""
        deadline = time.monotonic() + timeout_s
        loads: dict[str, tuple[int, int, int]] = {}
        while time.monotonic() < deadline:
            loads = {
                w.worker.worker_id: (
                    w.load.allocated_blocks,
                    w.load.allocated_blocks - w.load.referenced_blocks,
                    w.load.running_sequences + w.load.waiting_legs + w.load.parked_legs,
                )
                for w in self.status().workers
            }
            if loads and all(numbers == (0, 0, 0) for numbers in loads.values()):
                return
            time.sleep(POLL_S)
        raise AssertionError(f"blocks or legs are left (allocated, unaccounted, legs): {loads}")


def wait_until_ready(cluster: LiveCluster) -> None:
    """Polls /ready; raises with the log's end when the cluster dies or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if cluster.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://{cluster.http_address}/ready", timeout=2.0).status_code == 200:
                return
        time.sleep(POLL_S)
    raise AssertionError(f"the cluster is not ready:\n{cluster.log.read_text()[-4000:]}")


@contextlib.contextmanager
def live_cluster(folder: Path, settings: Mapping[str, Any]) -> Iterator[LiveCluster]:
    """`tandem up` with these settings on free ports; at the end SIGINT, and nothing may be left."""
    grpc_port, http_port = free_port(), free_port()
    config = {**settings, "router": {"grpc_port": grpc_port, "http_port": http_port}}
    config["router"] |= settings.get("router", {})
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    segments_before = shared_memory_segments()
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", "up", "-f", str(folder / "cluster.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        cluster = LiveCluster(process, f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}", log)
        started: list[psutil.Process] = []
        try:
            wait_until_ready(cluster)
            yield cluster
            started = cluster.descendants()
        finally:
            _stop(process)
    _, left = psutil.wait_procs(started, timeout=5.0)
    assert not left, f"processes are left: {left}"
    assert shared_memory_segments() <= segments_before


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait(5.0)
            raise
