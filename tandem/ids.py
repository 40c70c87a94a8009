"""Pure: identifiers that travel between rooms, as types of their own."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""A client's request, unique among the requests of one router."""

LegId = NewType("LegId", str)
"""A request's (or some of its samples') stay at one prefill/decode pair, unique among all routers."""

WorkerId = NewType("WorkerId", str)
"""A worker's stable name; with an incarnation it names one life of it."""

Incarnation = NewType("Incarnation", int)
"""Number of a worker's life; grows with every restart."""

BlockId = NewType("BlockId", int)
"""Index of a KV block in one worker's pool."""

BlockHash = NewType("BlockHash", bytes)
"""16-byte chain hash over all tokens up to and including a full block."""
