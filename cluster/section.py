"""Pure: what all mappings of cluster.yaml have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of cluster.yaml: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
