"""Pure: what `tandem bench kv` prints: rates beside the limits of the same rounds, and parts of hand-offs."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from benchmarks.kv_times import AdoptionTimes, CaseTimes, HandoffTimes, OverlapFigures, Road, Timed
from planner.statistics import percentile

LIMITS: Final = {"shm": "memcpy", "tcp": "loopback_tcp"}
"""What a transport is held against."""

PARTS: Final[dict[str, Callable[[Timed], float]]] = {
    "reserve": lambda timed: timed.reserve_s,
    "accept": lambda timed: timed.report.accept_s,
    "queue": lambda timed: timed.report.queue_s,
    "move": lambda timed: timed.report.move_s,
    "copy": lambda timed: timed.report.copy_s,
    "verify": lambda timed: timed.report.verify_s,
    "commit": lambda timed: timed.report.commit_s,
    "beyond_bytes": lambda timed: timed.beyond_bytes_s,
    "pull": lambda timed: timed.pull_s,
}
"""Parts of a hand-off by name, in seconds; `copy` is in `move`, and `beyond_bytes` is all but the copy."""


def case_json(case: CaseTimes) -> dict[str, Any]:
    """One element of `cases`."""
    limits = {"memcpy": _gbps(case, case.memcpy_s), "loopback_tcp": _gbps(case, case.raw_tcp_s)}
    return {
        "placement": case.layout.placement.value,
        "blocks": case.blocks,
        "block_bytes": case.layout.shape.block_bytes,
        "moved_bytes": case.moved_bytes,
        **{f"{name}_gbps": gbps for name, gbps in limits.items()},
        "hash_gbps": _gbps(case, case.hash_s),
        "roads": [_road_json(case, road, times, limits) for road, times in case.roads.items()],
    }


def handoff_json(times: HandoffTimes) -> dict[str, Any]:
    """The object `handoff`."""
    (blocks,) = times.layout.counts
    return {
        "busy_processes": times.busy_processes,
        "blocks": blocks,
        "moved_bytes": blocks * times.layout.shape.block_bytes,
        "roads": [
            {"transport": road.transport, "checksum": road.checksum, "pulls": len(pulls)}
            | {
                f"{name}_p{share}_ms": percentile(sorted(map(part, pulls)), share / 100) * 1e3
                for name, part in PARTS.items()
                for share in (50, 90)
            }
            for road, pulls in times.roads.items()
        ],
    }


def adoption_json(times: AdoptionTimes) -> dict[str, Any]:
    """One element of `adoption`."""
    return {
        "blocks": times.blocks,
        "moved_bytes": times.moved_bytes,
        "adopt_ms": statistics.median(times.adopt_s) * 1e3,
        "adopt_max_ms": max(times.adopt_s) * 1e3,
        "commit_ms": statistics.median(times.commit_s) * 1e3,
        "handoff_ms": statistics.median(times.handoff_s) * 1e3,
        "copied_handoff_ms": statistics.median(times.copy_s) * 1e3,
        "first_read_ms": statistics.median(times.first_read_s) * 1e3,
        "later_read_ms": statistics.median(times.later_read_s) * 1e3,
    }


def overlap_json(figures: OverlapFigures) -> dict[str, Any]:
    """The object `overlap`."""
    return {
        "codec": figures.codec,
        "prompt_tokens": figures.prompt_tokens,
        "moved_bytes": figures.moved_bytes,
        "rounds": figures.rounds,
        "link_gbps": figures.link_bytes_per_s / 1e9,
        "limit_ms": figures.limit_s * 1e3,
        "prefill_afterwards_ms": figures.prefill_afterwards_s * 1e3,
        "prefill_overlapped_ms": figures.prefill_overlapped_s * 1e3,
        "landed_afterwards_ms": figures.landed_afterwards_s * 1e3,
        "landed_overlapped_ms": figures.landed_overlapped_s * 1e3,
        "ratio": figures.ratio,
    }


def text(result: dict[str, Any]) -> str:
    """The same for a person."""
    return "\n".join(
        [
            *_case_lines(result["cases"]),
            "",
            *_handoff_lines(result["handoff"]),
            "",
            *_adoption_lines(result["adoption"]),
            *_overlap_lines(result["overlap"]),
            *_codec_lines(result["codecs"]),
        ]
    )


def _codec_lines(codecs: Sequence[dict[str, Any]]) -> Iterator[str]:
    if codecs:
        yield "\nWire codecs, on drawn numbers and one core:"
    for rates in codecs:
        size = f"{rates['encoded_bytes']:,} of {rates['block_bytes']:,} B ({rates['ratio']:.0%})"
        error = f"error {rates['mean_error']:.2%} in the mean, {rates['max_error']:.1%} at most"
        speed = f"encodes {rates['encode_gbps']:.2f}, decodes {rates['decode_gbps']:.2f} GB/s"
        yield f"  {rates['codec']:8} {size}, {error}; {speed}"


def _road_json(
    case: CaseTimes, road: Road, times: Sequence[Timed], limits: dict[str, float]
) -> dict[str, Any]:
    copies = [timed.report.copy_s for timed in times]
    limit = LIMITS[road.transport]
    gbps = _gbps(case, copies)
    return {
        "transport": road.transport,
        "checksum": road.checksum,
        "gbps": gbps,
        "gbps_min": case.moved_bytes / max(copies) / 1e9,
        "gbps_max": case.moved_bytes / min(copies) / 1e9,
        "move_gbps": _gbps(case, [timed.report.move_s for timed in times]),
        "pull_gbps": _gbps(case, [timed.pull_s for timed in times]),
        "limit": limit,
        "ratio": gbps / limits[limit],
    }


def _gbps(case: CaseTimes, times_s: Sequence[float]) -> float:
    return case.moved_bytes / statistics.median(times_s) / 1e9


def _case_lines(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        yield (
            f"{case['placement']} {case['blocks']} x {case['block_bytes']:,} B: memcpy "
            f"{case['memcpy_gbps']:.2f} GB/s, loopback TCP {case['loopback_tcp_gbps']:.2f} GB/s, hashing "
            f"{case['hash_gbps']:.2f} GB/s"
        )
        for road in case["roads"]:
            yield (
                f"  {road['transport']:4} {_hashing(road)}: {road['gbps']:6.2f} GB/s "
                f"({road['gbps_min']:.2f} to {road['gbps_max']:.2f}), {road['ratio']:.0%} of "
                f"{road['limit']}; move {road['move_gbps']:.2f}, whole pull {road['pull_gbps']:.2f} GB/s"
            )


def _handoff_lines(handoff: dict[str, Any]) -> Iterator[str]:
    yield (
        f"hand-off of {handoff['blocks']} blocks ({handoff['moved_bytes']:,} B) beside "
        f"{handoff['busy_processes']} busy processes, p50 / p90 in ms"
    )
    for road in handoff["roads"]:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {road[f'{name}_p50_ms']:.2f} / {road[f'{name}_p90_ms']:.2f}"
            for name in PARTS
        )
        yield f"  {road['transport']:4} {_hashing(road)}: {parts}"


def _adoption_lines(adoptions: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "hand-offs between pools in one arena, whose blocks change owners with the commit, in ms"
    for times in adoptions:
        yield (
            f"  {times['moved_bytes']:,} B: {times['adopt_ms']:.3f} (at most {times['adopt_max_ms']:.3f}) "
            f"of {times['commit_ms']:.2f} to commit and {times['handoff_ms']:.2f} in all; "
            f"copied {times['copied_handoff_ms']:.2f}; first read {times['first_read_ms']:.2f}, "
            f"later {times['later_read_ms']:.2f}"
        )


def _overlap_lines(overlap: dict[str, Any] | None) -> Iterator[str]:
    if overlap is None:
        return
    yield ""
    yield (
        f"prompts of {overlap['prompt_tokens']:,} tokens ({overlap['moved_bytes']:,} B, {overlap['codec']}) "
        f"over a link of {overlap['link_gbps']:g} GB/s, from the first token until the KV landed"
    )
    yield (
        f"  {overlap['landed_overlapped_ms']:.1f} ms when it moves while the prompt is read, "
        f"{overlap['landed_afterwards_ms']:.1f} ms afterwards: {overlap['ratio']:.1%}; "
        f"the bytes alone take {overlap['limit_ms']:.1f} ms"
    )


def _hashing(road: dict[str, Any]) -> str:
    return "with checksums   " if road["checksum"] else "without checksums"
