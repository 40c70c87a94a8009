"""Edge: tandem.v1.ClusterService: what runs, how loaded, how good, as this router sees it."""

import grpc.aio

from router.service_core import RouterCore
from router.worker_key import WorkerKey
from tandem.v1 import cluster_pb2 as cpb
from tandem.v1 import cluster_pb2_grpc
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import ROLE_TO_WIRE, address_to_wire
from tandem.worker import WorkerRecord


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """For operators."""

    def __init__(self, core: RouterCore) -> None:
        self._core = core

    async def Status(
        self,
        _request: cpb.StatusRequest,
        _context: "grpc.aio.ServicerContext[cpb.StatusRequest, cpb.StatusResponse]",
    ) -> cpb.StatusResponse:
        """Workers, load, goodput by class."""
        core = self._core
        verdict = core.verdict()
        return cpb.StatusResponse(
            model=core.config.model_name,
            ready=verdict.ready,
            not_ready_reason=verdict.reason,
            workers=[self._worker(record) for record in core.fleet.records],
            slo_classes=[
                cpb.SloClassStatus(
                    name=figure.slo.name,
                    ttft_s=figure.slo.ttft_s,
                    tpot_s=figure.slo.tpot_s,
                    longest_gap_s=figure.slo.longest_gap_s,
                    offered=figure.offered,
                    good=figure.good,
                    goodput_rps=figure.goodput_rps,
                )
                for figure in core.accounting.figures(core.clock())
            ],
            queued_requests=core.admission.queued,
            active_requests=core.admission.active,
            roles=[
                cpb.RoleStatus(role=ROLE_TO_WIRE[count.role], desired=count.desired, actual=count.actual)
                for count in core.roles()
            ],
        )

    async def Load(
        self,
        request: cpb.LoadRequest,
        _context: "grpc.aio.ServicerContext[cpb.LoadRequest, cpb.LoadResponse]",
    ) -> cpb.LoadResponse:
        """Totals, and the lengths of requests that ended lately."""
        core, totals = self._core, self._core.totals
        return cpb.LoadResponse(
            router_id=core.router_id,
            offered=totals.offered,
            settled=totals.settled,
            good=totals.good,
            ended=totals.ended,
            lengths=[
                cpb.RequestLengths(prompt_tokens=prompt, output_tokens=output)
                for prompt, output in totals.lengths_after(request.after)
            ],
            workers=[self._worker(record) for record in core.fleet.records],
        )

    def _worker(self, record: WorkerRecord) -> cpb.WorkerStatus:
        core = self._core
        key = WorkerKey(record.worker_id, record.incarnation)
        books = core.dispatcher.placement.loads.get(key)
        welcome = core.dispatcher.welcomes.get(key, wpb.WorkerWelcome())
        heard_s = None if books is None else books.heard_s
        return cpb.WorkerStatus(
            worker=address_to_wire(record),
            role=ROLE_TO_WIRE[record.role],
            attached=books is not None,
            load=core.dispatcher.snapshots.get(key, wpb.LoadSnapshot()),
            load_age_s=0.0 if heard_s is None else core.clock() - heard_s,
            metrics_address=welcome.metrics_address,
        )
