"""Pure: what a stub worker writes and which faults it commits (benchmarks/stub_worker.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from tandem.v1 import worker_pb2 as wpb


def stub_token(prompt: Sequence[int], sample_index: int, output_index: int, settings: "StubSettings") -> int:
    """The token at an index of an output: a function of prompt, sample and index only."""
    return token_of(mixed(prompt), sample_index, output_index, settings)


def mixed(prompt: Sequence[int]) -> int:
    """The prompt as one number, from which all its tokens follow."""
    value = len(prompt)
    for token_id in prompt:
        value = (value * 1_000_003 + token_id) & 0xFFFF_FFFF
    return value


def token_of(base: int, sample_index: int, output_index: int, settings: "StubSettings") -> int:
    """The token of a prompt that `mixed` made a number of."""
    spread = (base ^ (sample_index * 0x9E37_79B1 + output_index * 0x85EB_CA6B)) * 0xC2B2_AE35 & 0xFFFF_FFFF
    return settings.first_id + (spread >> 8) % (settings.vocabulary_tokens - settings.first_id)


class FaultKind(Enum):
    """What a scripted fault does when its index comes."""

    DIE = "die"
    """The server stops; all streams break."""
    DROP = "drop"
    """The sample is dropped with the fault's reason."""
    DUPLICATE = "duplicate"
    """The token is sent three times."""
    GAP = "gap"
    """The token is left out."""
    STALE = "stale"
    """Tokens of unknown legs and of unknown samples are sent as well."""
    LAND_TWICE = "land twice"
    """KvLanded is sent again: a breach of protocol."""
    SILENCE = "silence"
    """From now on nothing is sent, as if the process were stopped."""


COPIES = {FaultKind.GAP: 0, FaultKind.DUPLICATE: 3}
"""How often the token is sent that a fault strikes, where that is not once."""


@dataclass(slots=True)
class Fault:
    """A fault at an output index of any sample, for so many `times`."""

    kind: FaultKind
    at_index: int
    times: int = 1
    reason: "wpb.DropReason.ValueType" = wpb.DROP_REASON_PREEMPTED


@dataclass(slots=True)
class StubSettings:
    """How a stub behaves. Durations are seconds; `step_s` is the pause between two decode steps.

    Tokens lie in first_id .. vocabulary_tokens-1. `end_id`, if set, is written at `end_index` of each sample
    and ends it unless ignore_eos.
    """

    vocabulary_tokens: int = 256
    first_id: int = 3
    prefill_s: float = 0.0
    landing_s: float = 0.0
    step_s: float = 0.0
    end_id: int | None = None
    end_index: int = 0
    pool_blocks: int = 100_000
    faults: list[Fault] = field(default_factory=list)
