"""Edge: what a plan's hardware does with its model: step times, memory, links; reads the files that it
names."""

import csv
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.latency import LatencyModel
from planner.placements.placement import WorkerKind
from planner.plan.file import FleetFile, LatencySection, NodesSection
from planner.simulation.setup import EarlyFetch, Hops
from planner.step_times.correction import CorrectedRoofline
from planner.step_times.distserve_fit import DistServeFit, FitCoefficients, read_fits
from planner.step_times.hardware import Device, device_named
from planner.step_times.micro_batches import MicroBatches
from planner.step_times.model_shape import ModelShape, kv_capacity_tokens, model_named
from planner.step_times.operator_tables import ComposedModel, OperatorTable, collective_link, degrees
from planner.step_times.profile_file import Profile, measured_link, read_profile
from planner.step_times.profile_model import ProfileModel
from planner.step_times.roofline import Layout, Roofline
from planner.step_times.transfer_links import LinkTable, LinkTransfer, link_of_rate
from tandem.errors import ConfigError

MAX_FILE_BYTES = 64 << 20
"""Largest profile or table that is read."""

_LINK_LATENCY_S = 20e-6

_TRANSPORT = "shm"
"""How KV moves inside a node; a profile measures others, too."""
_COMPARED_BYTES = 1 << 24
"""A hand-off by which the slowest of several links is known."""


class PlannedWorkers:
    """Workers (planner/placements/space.py) of a plan or a simulation; each kind's model is made once."""

    def __init__(self, plan: FleetFile, folder: Path) -> None:
        """Files are relative to `folder`, the plan's. Raises ConfigError for names and files without
        sense."""
        self._plan, self._folder = plan, folder
        self.model = (
            model_named(plan.model) if isinstance(plan.model, str) else ModelShape(**plan.model.model_dump())
        )
        self._nodes = {nodes.device: nodes for nodes in plan.hardware}
        self._devices = {name: device_named(name) for name in self._nodes}
        self._models: dict[WorkerKind, LatencyModel | None] = {}

    def latency(self, kind: WorkerKind) -> LatencyModel | None:
        """See Workers."""
        if kind not in self._models:
            whole = self._made(kind)
            self._models[kind] = whole if whole is None or kind.pp == 1 else MicroBatches(whole, kind.pp)
        return self._models[kind]

    def kv_tokens(self, kind: WorkerKind) -> int:
        """See Workers."""
        return kv_capacity_tokens(
            self.model, self.memory_bytes(kind.device), kind.devices, self._plan.memory_use
        )

    def memory_bytes(self, device: str) -> float:
        """Memory of one device."""
        return float(self._nodes[device].memory or self._devices[device].memory_bytes)

    def early(self) -> EarlyFetch | None:
        """KV that moves while prompts are read, as far as the file wants it."""
        least = self._plan.overlap_min_tokens
        if least is None:
            return None
        layer_bytes = self.model.kv_bytes_per_token * self._plan.block_size / self.model.layers
        return EarlyFetch(least, self.model.layers, round(layer_bytes), self.transfer())

    def hops(self) -> Hops:
        """What messages take."""
        return Hops(**self._plan.hops.model_dump())

    def transfer(self) -> LinkTransfer:
        """KV moves at the slowest device's link inside a node, at the network's rate between nodes.

        Inside a node, what the profiles of all devices measured is taken for it where they did.
        """
        return LinkTransfer(
            self.model.kv_bytes_per_token,
            self._plan.block_size,
            self._inside(),
            link_of_rate(self._plan.network_gbps * 1e9 / 8, _LINK_LATENCY_S),
            self._plan.hand_over_s,
            self._plan.ask_s,
        )

    def _inside(self) -> LinkTable:
        links = [
            measured_link(self._profile(nodes.latency), _TRANSPORT)
            if nodes.latency.kind == "profile"
            else None
            for nodes in self._nodes.values()
        ]
        measured = [link for link in links if link is not None]
        if len(measured) < len(links):
            slowest = min(device.link_bytes_s for device in self._devices.values())
            return link_of_rate(slowest, _LINK_LATENCY_S)
        return max(measured, key=lambda link: link.seconds(_COMPARED_BYTES))

    def _made(self, kind: WorkerKind) -> LatencyModel | None:
        if self.model.heads % kind.tp or kind.pp > self.model.layers:
            return None
        nodes, device = self._nodes[kind.device], self._devices[kind.device]
        source = nodes.latency
        layout = Layout(device, kind.tp, kind.pp, self._stage_link(nodes, device, kind))
        if source.kind == "distserve":
            fit = self._fits(source).get(kind.tp)
            return None if fit is None else DistServeFit(fit, kind.pp)
        if source.kind == "operators":
            return self._composed(source, layout)
        if source.kind == "profile":
            return ProfileModel(self._profile(source)) if kind.devices == 1 else None
        base = Roofline(self.model, layout)
        if source.file is None or kind.devices > 1:
            return base
        return CorrectedRoofline(base, self._profile(source).points)

    def _stage_link(self, nodes: NodesSection, device: Device, kind: WorkerKind) -> float:
        """Stages talk inside a node where the whole worker fits into one."""
        if kind.devices <= nodes.devices_per_node:
            return device.link_bytes_s
        return self._plan.network_gbps * 1e9 / 8

    def _fits(self, source: LatencySection) -> Mapping[int, FitCoefficients]:
        fits = read_fits(_json(self._path(source.file)))
        if source.key not in fits:
            raise ConfigError(f"{source.file} has no model {source.key!r}; it has {', '.join(fits)}")
        return fits[source.key]

    def _profile(self, source: LatencySection) -> Profile:
        return read_profile(_json(self._path(source.file)), str(source.file))

    def _composed(self, source: LatencySection, layout: Layout) -> LatencyModel | None:
        rows = _rows(self._path(source.file))
        if layout.tp not in degrees(rows):
            return None
        reduce = sends = None
        if layout.tp > 1:
            reduce = collective_link(_rows(self._path(source.all_reduce)), "all_reduce", layout.tp, layout.tp)
        if layout.pp > 1:
            sends = collective_link(_rows(self._path(source.send_recv)), "send_recv", 2, 2)
        return ComposedModel(self.model, layout, OperatorTable(rows, layout.tp), reduce, sends)

    def _path(self, name: str | None) -> Path:
        if name is None:
            raise ConfigError(
                "latency of kind operators needs all_reduce for tp and send_recv for pp above 1"
            )
        return self._folder / name


@lru_cache(maxsize=32)
def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


@lru_cache(maxsize=32)
def _rows(path: Path) -> Sequence[Mapping[str, str]]:
    try:
        return tuple(csv.DictReader(_text(path).splitlines()))
    except csv.Error as error:
        raise ConfigError(f"{path}: not CSV: {error}") from error


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    return content.decode(errors="replace")
