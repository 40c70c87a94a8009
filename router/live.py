"""Edge: a request that is being served: its session, and what the edge keeps beside it."""

import asyncio
from dataclasses import dataclass, field

from router.session import Session
from tandem.ids import LegId
from tandem.v1 import inference_pb2 as pb


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request of the core.

    `news` is set when its reader should look; `started` once a prefill worker was given one of its legs,
    `emitting` once a token came; `leg_ids` are the legs that the dispatcher knows of.
    """

    session: Session
    sampling: pb.SamplingParams
    news: asyncio.Event
    started: bool = False
    emitting: bool = False
    leg_ids: set[LegId] = field(default_factory=set)
    deadline: asyncio.TimerHandle | None = None
