"""Pure: a line of the request log: how a request ended, without a word of what it said; docs/simulator.md."""

import json
from dataclasses import dataclass

_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """One request that ended; `arrived_s` on the router's clock, the other times as in TimelineReport.

    `outcome` is `finished`, `Cancelled` or the name of the error; `ttft_s` and `tpot_s` are 0 where there is
    none. `output_tokens` counts all samples.
    """

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str
    outcome: str
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def to_line(self, clock_zero_s: float) -> bytes:
        """One line of JSON; `clock_zero_s`: when the router's clock was 0, in seconds since 1970."""
        entry = {
            "arrival_s": round(self.arrived_s + clock_zero_s, _DECIMALS),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "slo_class": self.slo_class,
            "outcome": self.outcome,
            "ttft_s": round(self.ttft_s, _DECIMALS),
            "tpot_s": round(self.tpot_s, _DECIMALS),
        }
        return json.dumps(entry).encode() + b"\n"
