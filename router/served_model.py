"""Pure: what the front doors must know of the served model to judge a request."""

from dataclasses import dataclass

from tandem.slo import SloClass


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model's name and sizes, and the SLO classes by name."""

    name: str
    context_tokens: int
    vocabulary_tokens: int
    slo_classes: dict[str, SloClass]
    default_slo_class: str
    request_timeout_s: float
