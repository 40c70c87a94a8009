"""docs/metrics.md names every metric of router and worker, with its kind and labels, and no other."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from engine.leg import LoadNumbers
from engine.worker_metrics import WorkerMetrics
from router.metrics import RouterGauges, RouterMetrics

PAGE = Path(__file__).parents[1] / "docs/metrics.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\|", re.MULTILINE)


def _documented(section: str) -> dict[str, str]:
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return {row["name"]: row["kind"] for row in ROW.finditer(text)}


def _exposed(registry: CollectorRegistry) -> dict[str, str]:
    return {metric.name: metric.type for metric in registry.collect()}


def test_router_metrics_are_documented() -> None:
    metrics = RouterMetrics()
    metrics.watch(lambda: RouterGauges(queued=0, active=0, ready=True, loads=(), goodput=()))
    assert _documented("Router") == _exposed(metrics.registry)


def test_worker_metrics_are_documented() -> None:
    metrics = WorkerMetrics()
    metrics.observe_load(LoadNumbers(0, 0, 0, 0, 4, 3, 1, 1))
    assert _documented("Worker") == _exposed(metrics.registry)
