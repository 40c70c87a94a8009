"""Pure: what `make gpu-check` writes down."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuFigure:
    """One measured figure; `limit` says in words what it should be, empty for none."""

    what: str
    figure: str
    limit: str = ""
    holds: bool = True


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """Where and of what it was measured."""

    date: str
    device: str
    versions: str
    commit: str


def render(machine: GpuMachine, figures: Sequence[GpuFigure]) -> str:
    """A page of docs/measurements, in Markdown."""
    rows = [
        f"| {found.what} | {found.figure} | {found.limit or '-'} | {'yes' if found.holds else 'NO'} |"
        for found in figures
    ]
    return "\n".join(
        [
            f"# GPU checks, {machine.date}",
            "",
            f"Device: {machine.device}; {machine.versions}; commit {machine.commit}.",
            "Made by `make gpu-check`; each figure is of one run, beside its limit of the same run.",
            "",
            "| what | figure | limit | holds |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
