"""Pure: what a launch tells those who wait for it."""

from enum import Enum

from tandem.ids import WorkerId


class Phase(Enum):
    """A part of the start; some run beside each other."""

    REGISTRY = "registry"
    MODEL = "model"
    RAY = "ray"
    ROUTER = "router"
    WORKERS = "workers"
    PROOF = "first hand-off"


class LaunchProgress:
    """Listens to a launch; this one is silent, others override what they want to show."""

    def began(self, phase: Phase) -> None:
        """A phase began."""

    def ended(self, phase: Phase, seconds: float) -> None:
        """A phase ended well."""

    def model_bytes(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the model is converted; called from another thread."""

    def worker_registered(self, worker_id: WorkerId) -> None:
        """A worker serves."""
