"""docs/metrics.md names every metric of router, worker and controller, with its kind and labels."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from cluster.controller.metrics import ControllerMetrics
from engine.leg import CommunicatorNumbers, LoadNumbers
from engine.step import StepPlan, StepResult
from engine.worker_process.worker_metrics import WorkerMetrics
from planner.control.controller import Action, ActionKind, Decision, Verdict
from planner.control.load_window import RolePlacement
from router.metrics import RouterGauges, RouterMetrics
from router.role_counts import RoleCount
from router.slo_accounting import ClassGoodput
from router.worker_key import WorkerKey
from tandem.errors import TransferFault
from tandem.ids import Incarnation, WorkerId
from tandem.slo import SloClass
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role

PAGE = Path(__file__).parents[1] / "docs/metrics.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\|", re.MULTILINE)

Described = dict[str, tuple[str, frozenset[str]]]
"""Name -> (kind, labels)."""


def _documented(section: str) -> Described:
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = ROW.finditer(text)
    return {row["name"]: (row["kind"], frozenset(re.findall(r"`(\w+)`", row["labels"]))) for row in rows}


def _exposed(registry: CollectorRegistry) -> Described:
    described: Described = {}
    for metric in registry.collect():
        assert metric.samples, f"{metric.name} has no sample, so its labels are not known"
        labels = {label for sample in metric.samples for label in sample.labels}
        described[metric.name] = (metric.type, frozenset(labels - {"le"}))
    return described


def test_router_metrics_are_documented() -> None:
    metrics = RouterMetrics()
    slo = SloClass("chat", 1.0, 1.0, 1.0)
    loads = [(WorkerKey(WorkerId("d0"), Incarnation(1)), wpb.LoadSnapshot())]
    goodput = [ClassGoodput(slo, 1, 1, 1.0)]
    roles = [RoleCount(Role.DECODE, 2, 1)]
    metrics.watch(
        lambda: RouterGauges(queued=0, active=0, ready=True, loads=loads, goodput=goodput, roles=roles)
    )
    metrics.observe_handoff(wpb.KvLanded(transport="tcp"))
    metrics.requests.labels(slo_class="chat", outcome="finished").inc()
    metrics.slo_missed.labels(slo_class="chat", stage="queue").inc()
    metrics.replacements.labels(reason="gap").inc()
    metrics.calls.labels(api="http", code="200").inc()
    assert _documented("Router") == _exposed(metrics.registry)


def test_worker_metrics_are_documented() -> None:
    metrics = WorkerMetrics()
    metrics.observe_load(LoadNumbers(0, 0, 0, 0, 4, 3, 1, 1))
    metrics.observe_communicators(CommunicatorNumbers())
    metrics.observe_step(StepPlan(0, ()), StepResult(0, (), 0.1))
    metrics.observe_guesses(3, 2)
    metrics.dropped.labels(reason="preempted").inc()
    metrics.handoff_seconds.labels(part="move").observe(0.1)
    metrics.handoff_bytes.labels(transport="tcp").inc()
    metrics.early_fetches.labels(outcome="lost").inc()
    metrics.transfer_faults.labels(fault="timeout").inc()
    source = WorkerKey(WorkerId("p0"), Incarnation(1))
    metrics.transfers.transferred("tcp")
    metrics.transfers.failed("shm", TransferFault.TIMEOUT)
    metrics.transfers.road_taken(source, "", "shm")
    metrics.transfers.road_taken(source, "shm", "tcp")
    metrics.transfers.refused(TransferFault.DIGEST)
    metrics.transfers.link_refused("tcp", TransferFault.TRUNCATED)
    assert _documented("Worker") == _exposed(metrics.registry)


def test_controller_metrics_are_documented() -> None:
    metrics = ControllerMetrics()
    action = Action(ActionKind.ADD_DECODE, 1, True)
    decision = Decision(0.0, Verdict.SHORT, RolePlacement(1, 2), (action,), 1.0, 2.0)
    metrics.decided(decision, written=True)
    assert _documented("Controller") == _exposed(metrics.registry)


def test_no_metric_of_a_worker_is_also_one_of_the_router() -> None:
    assert not _documented("Router").keys() & _documented("Worker").keys()
