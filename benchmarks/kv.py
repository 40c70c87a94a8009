"""Edge: `tandem bench kv`: KV between two processes over every transport, beside what limits it."""

import argparse
import asyncio
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from benchmarks.bench_arguments import check_positive
from benchmarks.kv_adoption import measured_adoption
from benchmarks.kv_codec_rates import CodecRates, codec_rates
from benchmarks.kv_handoffs import measured_handoffs
from benchmarks.kv_layouts import adopted_counts, layouts
from benchmarks.kv_pulls import measured
from benchmarks.kv_report import adoption_json, case_json, handoff_json, overlap_json, text
from benchmarks.kv_times import AdoptionTimes, CaseTimes, HandoffTimes, OverlapFigures, Road
from benchmarks.overlap import measure_overlap
from tandem.logs import configure_logging

TRANSPORTS: Final = ("shm", "tcp")

HANDOFF_PULLS: Final = 60

OVERLAP_ROUNDS: Final = 3
"""Two prompts of 1,200 tokens each: seconds a round."""

CODEC_ROUNDS: Final = 5
"""Each codes and decodes 6 MB a round: tens of milliseconds."""


def run(chosen: argparse.Namespace) -> int:
    """Prints medians over the rounds. Raises TandemError."""
    check_positive({"--rounds": chosen.rounds})
    # As in a worker's hand-off: the benchmark copies on one core, whatever torch may do on more.
    torch.set_num_threads(1)
    configure_logging(logging.WARNING)
    measuring = _measure(chosen.rounds, chosen.quick, chosen.codec, chosen.arena_folder)
    result = asyncio.run(measuring)
    print(json.dumps(result) if chosen.json else text(result))
    return 0


async def _measure(rounds: int, quick: bool, codec: str, arena_folder: str) -> dict[str, Any]:
    roads = [Road(transport, checksum) for transport in TRANSPORTS for checksum in (False, True)]
    cases = [case for layout in layouts(quick) for case in await measured(layout, roads, rounds)]
    checked = [road for road in roads if road.checksum]
    handoffs = await measured_handoffs(checked, HANDOFF_PULLS // 3 if quick else HANDOFF_PULLS)
    adoptions = await measured_adoption(adopted_counts(quick), rounds, arena_folder)
    overlap = None if quick else await measure_overlap(min(rounds, OVERLAP_ROUNDS), codec=codec)
    codecs = codec_rates(min(rounds, CODEC_ROUNDS))
    return result_json(cases, rounds, handoffs, adoptions, overlap, codecs)


def result_json(
    cases: list[CaseTimes],
    rounds: int,
    handoffs: HandoffTimes,
    adoptions: list[AdoptionTimes],
    overlap: OverlapFigures | None,
    codecs: Sequence[CodecRates] = (),
) -> dict[str, Any]:
    """Output of `tandem bench kv --json`; the keys are documented in docs/json-output.md."""
    return {
        "benchmark": "kv",
        "rounds": rounds,
        "cores": os.cpu_count(),
        "cases": [case_json(case) for case in cases],
        "handoff": handoff_json(handoffs),
        "adoption": [adoption_json(times) for times in adoptions],
        "overlap": None if overlap is None else overlap_json(overlap),
        "codecs": [asdict(rates) for rates in codecs],
    }
