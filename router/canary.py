"""Edge: a tiny request of the router's own whenever no hand-off landed lately, so that ready means ready."""

import asyncio
import uuid
from contextlib import aclosing

import structlog

from router.request import GenerationRequest
from router.service_core import RouterCore
from router.validation import MAX_PRIORITY
from tandem.errors import TandemError
from tandem.ids import RequestId
from tandem.sampling import SamplingParams
from tandem.worker import Role

log = structlog.get_logger(__name__)

CANARY_PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
CANARY_PROMPT = (0,)
FIRST_RETRY_S = 0.25
SHORTEST_TIMEOUT_S = 5.0


async def run_canaries(core: RouterCore) -> None:
    """Sends a canary as soon as a pair is attached, then one each interval without a real hand-off."""
    interval_s = core.config.canary_interval_s
    pause_s = min(FIRST_RETRY_S, interval_s)
    while True:
        placement = core.dispatcher.placement
        pair = placement.serves(Role.PREFILL) and placement.serves(Role.DECODE)
        if pair and not core.draining and core.readiness.canary_due(core.clock()):
            ok = await _send_canary(core)
            pause_s = interval_s / 4 if ok else min(interval_s, pause_s * 2)
        core.dispatcher.pair_attached.clear()
        try:
            async with asyncio.timeout(pause_s):
                await core.dispatcher.pair_attached.wait()
        except TimeoutError:
            continue


async def _send_canary(core: RouterCore) -> bool:
    """One prompt token, two output tokens, so one hand-off; returns whether it came through."""
    request = GenerationRequest(
        request_id=RequestId(f"canary-{uuid.uuid4().hex}"),
        token_ids=CANARY_PROMPT,
        sampling=CANARY_PARAMS,
        slo_class=core.config.default_slo_class,
        arrived_s=core.clock(),
        priority=MAX_PRIORITY,
        timeout_s=max(SHORTEST_TIMEOUT_S, 2 * core.config.canary_interval_s),
        internal=True,
    )
    try:
        async with aclosing(core.generate(request)) as updates:
            async for _ in updates:
                pass
    except TandemError as error:
        log.warning("canary failed", error=str(error))
        return False
    return True
