"""Pure: which attention a GPU runs, what each can do, and why the choice fell as it did."""

from collections.abc import Collection
from dataclasses import dataclass

from engine.models.model_config import ModelConfig
from tandem.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class AttentionCapability:
    """What one back-end can do.

    None for `head_dims` or `dtypes` means any. `least_capability` is CUDA's (major, minor); `graphs` says
    whether a CUDA graph may hold a decode step, `trees` whether it verifies guesses on several branches.
    """

    name: str
    head_dims: frozenset[int] | None
    dtypes: frozenset[str] | None
    least_capability: tuple[int, int]
    package: str | None
    graphs: bool
    trees: bool

    def lacks(
        self, config: ModelConfig, dtype: str, capability: tuple[int, int], installed: Collection[str]
    ) -> str | None:
        """Why it cannot run this model here; None when it can."""
        if self.package is not None and self.package not in installed:
            return f"the package {self.package} is not installed"
        if self.head_dims is not None and config.head_dim not in self.head_dims:
            return f"it has no kernels for heads of {config.head_dim} numbers"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it does not compute in {dtype}"
        if capability < self.least_capability:
            return "the device's compute capability is {}.{}".format(*capability)
        return None


ATTENTIONS = (
    AttentionCapability(
        name="flashinfer",
        head_dims=frozenset({64, 128, 256}),
        dtypes=frozenset({"bfloat16"}),
        least_capability=(8, 0),
        package="flashinfer",
        graphs=True,
        trees=False,
    ),
    AttentionCapability(
        name="triton",
        head_dims=None,
        dtypes=None,
        least_capability=(8, 0),
        package="triton",
        graphs=True,
        trees=False,
    ),
    AttentionCapability(
        name="sdpa",
        head_dims=None,
        dtypes=None,
        least_capability=(0, 0),
        package=None,
        graphs=False,
        trees=True,
    ),
)
"""Best first. Trees go to sdpa whatever was chosen."""

ATTENTION_NAMES = (AUTO, *(able.name for able in ATTENTIONS))


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The back-end that is used, and why not a better one."""

    capability: AttentionCapability
    reason: str


def choose_attention(
    wanted: str,
    config: ModelConfig,
    dtype: str,
    capability: tuple[int, int],
    installed: Collection[str],
) -> AttentionChoice:
    """The back-end named, or with AUTO the best that can run the model.

    `installed` names packages that can be imported. Raises ConfigError for a name that is unknown or cannot
    run the model here.
    """
    if wanted not in ATTENTION_NAMES:
        allowed = ", ".join(ATTENTION_NAMES)
        raise ConfigError(f"attention {wanted!r} is unknown; allowed: {allowed}.")
    against: list[str] = []
    for able in ATTENTIONS:
        if wanted not in (AUTO, able.name):
            continue
        lack = able.lacks(config, dtype, capability, installed)
        if lack is None:
            own = "it is the best that there is" if wanted == AUTO else "the settings name it"
            return AttentionChoice(able, "; ".join((*against, own)))
        against.append(f"not {able.name}: {lack}")
    raise ConfigError(f"attention {wanted!r} cannot run this model here: {'; '.join(against)}.")
