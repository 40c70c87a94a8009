"""Pure: what all sections of cluster.yaml share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_REPLICAS = 1024
"""Most workers of a role."""

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A mapping of cluster.yaml: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
