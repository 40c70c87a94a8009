"""Edge: the gRPC front door as a whole: our services, standard health checking and reflection on one port."""

import asyncio

from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from engine.models.tokenizer import Tokenizer
from router.cluster_service import ClusterService
from router.inference_service import SERVICE_NAME, InferenceService
from router.intake import Intake
from router.interceptors import EdgeInterceptor
from router.service_core import RouterCore
from tandem import grpc_edge
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

HEALTH_TICK_S = 0.2
CLUSTER_SERVICE_NAME = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name


class GrpcDoor:
    """The public gRPC server. Health follows readiness."""

    def __init__(self, core: RouterCore, intake: Intake, tokenizer: Tokenizer, api_key: str | None) -> None:
        self._core = core
        self._health = health.aio.HealthServicer()
        refused = core.metrics.calls.labels("grpc", "UNAUTHENTICATED")
        edge = EdgeInterceptor(core.metrics.calls)
        self._server = grpc_edge.server(api_key, [edge], refused.inc)
        self._server.add_generic_rpc_handlers([InferenceService(core, intake, tokenizer).handlers()])
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterService(core), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, CLUSTER_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the bound port (0 lets the system choose). Raises OSError if taken."""
        bound = grpc_edge.bind(self._server, host, port)
        await self._server.start()
        return bound

    async def follow_readiness(self) -> None:
        """Keeps the health service in step until cancelled."""
        shown: bool | None = None
        while True:
            ready = self._core.verdict().ready
            if ready is not shown:
                shown = ready
                serving = health_pb2.HealthCheckResponse.SERVING
                status = serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING
                for name in (health.OVERALL_HEALTH, SERVICE_NAME, CLUSTER_SERVICE_NAME):
                    await self._health.set(name, status)
            await asyncio.sleep(HEALTH_TICK_S)

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, and cancels those that still run after the grace."""
        await self._server.stop(grace_s)
