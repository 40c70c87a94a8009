"""Edge: writes the cluster.yaml of a plan."""

from pathlib import Path

from planner.placements.mix import Mix
from planner.plan.cluster import cluster_yaml
from planner.plan.run import Problem
from tandem.errors import ConfigError


def write_cluster_yaml(problem: Problem, mix: Mix, path: Path) -> None:
    """Raises ConfigError when `tandem up` could not run the mix, or the file can't be written."""
    workers = problem.workers
    text = cluster_yaml(
        problem.plan, mix, workers, workers.model.kv_bytes_per_token, model_source=workers.model.name
    )
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error
