"""Edge: chooses the layouts of a model's weights by times measured here, now or by an earlier process."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Annotated

import structlog
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from engine.cache_folder import cache_folder, locked
from engine.cpu.layout_times import measure_ways
from engine.cpu.layouts import Shape, Times, Way, choose, packed_up_to
from engine.cpu.linear import Linear, MakeProduct, packed_linear
from engine.cpu.processor import processor_features, processor_name

_VERSION = 1
_LOCK_TIMEOUT_S = 10.0
_MOST_FILE_BYTES = 4 * 1024**2
_LEAST_ELEMENTS = 1 << 16
"""A product with a smaller weight takes as long as its call, whatever the layout."""

_log = structlog.get_logger(__name__)

Measure = Callable[[Iterable[Shape], torch.dtype], Mapping[Shape, Times]]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class MeasuredOn:
    """What times depend on beside shape and rows: all of it must be equal for them to be taken."""

    processor: str
    features: str
    torch: str
    threads: int
    dtype: str
    version: int = _VERSION


@dataclass(frozen=True, slots=True)
class _MeasuredProduct:
    out: Positive
    inner: Positive
    rows: Positive
    way: Way
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class _File:
    measured_on: MeasuredOn
    products: tuple[_MeasuredProduct, ...]


_FILE = TypeAdapter(_File)


def choose_linears(
    shapes: Mapping[Shape, int],
    dtype: torch.dtype,
    cache: Path | None = None,
    measure: Measure = measure_ways,
    native_rows: int = 0,
) -> MakeProduct:
    """What lays out and multiplies by each weight of a model; `shapes` says how many it has of each.

    Times are taken from `cache` (default: the machine's cache folder) when they were measured with this
    processor, torch, dtype and number of threads, else measured and put there. A cache that cannot be read
    or written costs the measurement, nothing else. Up to `native_rows` rows are multiplied natively over the
    packed layout, so that others are no choice there.
    """
    began_s = time.perf_counter()
    wanted = [shape for shape in shapes if prod(shape) >= _LEAST_ELEMENTS]
    times, fresh = (
        _times(wanted, dtype, (cache or cache_folder()) / "layouts", measure) if wanted else ({}, 0)
    )
    bands = choose({shape: packed_up_to(found, native_rows) for shape, found in times.items()}, shapes)
    _log.info(
        "layouts chosen",
        took_s=round(time.perf_counter() - began_s, 3),
        shapes_measured=fresh,
        ways={
            f"{out}x{inner}": " ".join(f"{band.way.value}<={band.most_rows or 'all'}" for band in found)
            for (out, inner), found in bands.items()
        },
    )

    def linear(weight: Tensor, bias: Tensor | None) -> Linear:
        found = bands.get((weight.shape[0], weight.shape[1]))
        return packed_linear(weight, bias) if found is None else Linear(weight, bias, found)

    return linear


def _times(
    shapes: list[Shape], dtype: torch.dtype, folder: Path, measure: Measure
) -> tuple[dict[Shape, Times], int]:
    """The times of the shapes and how many of them were measured now.

    Under a lock, so that workers that start together do not measure each other.
    """
    measured_on = MeasuredOn(
        processor_name(), processor_features(), torch.__version__, torch.get_num_threads(), str(dtype)
    )
    path = folder / f"{sha256(repr(measured_on).encode()).hexdigest()[:32]}.json"
    known = _read(path, measured_on)
    if all(shape in known for shape in shapes):
        return {shape: known[shape] for shape in shapes}, 0
    with ExitStack() as holding:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            holding.enter_context(locked(path.with_suffix(".lock"), _LOCK_TIMEOUT_S))
        except OSError as error:
            _log.warning("layouts are measured without a cache", reason=str(error))
        known = _read(path, measured_on)
        found = measure([shape for shape in shapes if shape not in known], dtype)
        known |= found
        _write(path, measured_on, known)
    return {shape: known[shape] for shape in shapes if shape in known}, len(found)


def _read(path: Path, measured_on: MeasuredOn) -> dict[Shape, Times]:
    """Nothing when the file is absent, damaged, or of another machine."""
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"more than {_MOST_FILE_BYTES} bytes")
        file = _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ValidationError) as error:
        _log.warning(
            "measured layouts cannot be read and are measured again", path=str(path), error=str(error)
        )
        return {}
    if file.measured_on != measured_on:
        _log.warning("layouts are measured again: their file is of another machine", path=str(path))
        return {}
    times: dict[Shape, dict[int, dict[Way, float]]] = {}
    for one in file.products:
        times.setdefault((one.out, one.inner), {}).setdefault(one.rows, {})[one.way] = one.seconds
    return dict(times)


def _write(path: Path, measured_on: MeasuredOn, times: Mapping[Shape, Times]) -> None:
    """Beside the file and then renamed: a reader finds the old one or the new one."""
    products = tuple(
        _MeasuredProduct(*shape, rows, way, seconds)
        for shape, buckets in times.items()
        for rows, ways in buckets.items()
        for way, seconds in ways.items()
    )
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(_FILE.dump_json(_File(measured_on, products)))
        unfinished.replace(path)
    except OSError as error:
        _log.warning("measured layouts cannot be kept", path=str(path), error=str(error))
        with suppress(OSError):
            unfinished.unlink()
