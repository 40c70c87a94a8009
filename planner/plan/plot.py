"""Edge: draws attainment against rate and against the scale of the SLO, as the papers do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Line:
    """One candidate's points: (rate a device in req/s, attainment) and (SLO scale, attainment)."""

    label: str
    by_rate: Sequence[tuple[float, float]]
    by_scale: Sequence[tuple[float, float]]


def draw(lines: Sequence[Line], attainment: float, path: Path) -> None:
    """Writes the picture; the ending of `path` decides the format. Raises ConfigError when it can't be
    written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for line in lines:
        left.plot(*zip(*line.by_rate, strict=True), marker="o", label=line.label)
        right.plot(*zip(*line.by_scale, strict=True), marker="o", label=line.label)
    left.set_xlabel("requests a second and device")
    right.set_xlabel("SLO scale (smaller is stricter)")
    right.invert_xaxis()
    for axes in (left, right):
        axes.axhline(attainment, color="grey", linestyle="--", linewidth=1)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("attainment")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot can't be written: {error}") from error
    finally:
        pyplot.close(figure)
