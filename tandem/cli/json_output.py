"""Pure: what `--json` prints; the keys are documented in docs/json-output.md and stay."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tandem.generation import Update
from tandem.v1 import cluster_pb2
from tandem.wire import ROLE_FROM_WIRE


def generation_json(updates: Sequence[Update]) -> dict[str, Any]:
    """Output of `tandem generate --json`: all samples of one request; times in seconds."""
    samples: dict[int, dict[str, Any]] = {}
    for update in updates:
        for delta in update.deltas:
            sample = samples.setdefault(
                delta.sample_index,
                {"index": delta.sample_index, "text": "", "token_ids": [], "finish_reason": None},
            )
            sample["text"] += delta.text
            sample["token_ids"] += delta.token_ids
            if delta.finish is not None:
                sample["finish_reason"] = delta.finish.value
    usage = next((update.usage for update in updates if update.usage is not None), None)
    timeline = next((update.timeline for update in updates if update.timeline is not None), None)
    return {
        "request_id": updates[0].request_id if updates else "",
        "samples": [sample for _, sample in sorted(samples.items())],
        "usage": None if usage is None else asdict(usage),
        "timeline": None if timeline is None else asdict(timeline),
    }


def status_json(status: cluster_pb2.StatusResponse) -> dict[str, Any]:
    """Output of `tandem status --json`."""
    return {
        "model": status.model,
        "ready": status.ready,
        "not_ready_reason": status.not_ready_reason,
        "queued_requests": status.queued_requests,
        "active_requests": status.active_requests,
        "roles": [_role(count) for count in status.roles],
        "workers": [_worker(worker) for worker in status.workers],
        "slo_classes": [_slo_class(entry) for entry in status.slo_classes],
    }


def _role(count: cluster_pb2.RoleStatus) -> dict[str, Any]:
    return {
        "role": ROLE_FROM_WIRE[count.role].value,
        "desired": count.desired if count.HasField("desired") else None,
        "actual": count.actual,
    }


def _worker(status: cluster_pb2.WorkerStatus) -> dict[str, Any]:
    role = ROLE_FROM_WIRE.get(status.role)
    return {
        "worker_id": status.worker.worker_id,
        "incarnation": status.worker.incarnation,
        "address": status.worker.address,
        "digest": status.worker.digest,
        "role": None if role is None else role.value,
        "attached": status.attached,
        "metrics_address": status.metrics_address,
        "load_age_s": status.load_age_s,
        "load": {
            "waiting_prefill_tokens": status.load.waiting_prefill_tokens,
            "waiting_legs": status.load.waiting_legs,
            "running_sequences": status.load.running_sequences,
            "parked_legs": status.load.parked_legs,
            "total_blocks": status.load.total_blocks,
            "free_blocks": status.load.free_blocks,
            "allocated_blocks": status.load.allocated_blocks,
            "referenced_blocks": status.load.referenced_blocks,
            "steps": status.load.steps,
            "handoffs_committed": status.load.handoffs_committed,
            "stalled_s": status.load.stalled_s,
            "busy_s": status.load.busy_s,
            "draining": status.load.draining,
        },
    }


def _slo_class(status: cluster_pb2.SloClassStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "ttft_s": status.ttft_s,
        "tpot_s": status.tpot_s,
        "longest_gap_s": status.longest_gap_s,
        "offered": status.offered,
        "good": status.good,
        "goodput_rps": status.goodput_rps,
    }
