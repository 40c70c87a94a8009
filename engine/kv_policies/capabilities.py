"""Pure: what each way to keep or read less KV goes together with; the rest is refused at the start."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.kv_policies.bounded_kv import KvBudget
from tandem.worker_config import WorkerConfig

INT8 = "int8"
QUEST = "quest"
MORPH = "morph"
FULL = "full"


@dataclass(frozen=True, slots=True)
class KvSettings:
    """The settings of one worker that have to agree; `kv_dtype` is how K and V are stored."""

    kv_dtype: str
    selection: str = FULL
    device: str = "cpu"
    codec: str = "identity"
    speculates: bool = False


@dataclass(frozen=True, slots=True)
class KvCapability:
    """What a `setting` runs with; None for `kv_dtypes` or `codecs` means any.

    `no_guesses` says why it does not go with speculative decoding; None: it does.
    """

    setting: str
    chosen: Callable[[KvSettings], bool]
    kv_dtypes: frozenset[str] | None
    codecs: frozenset[str] | None
    gpu: bool
    no_guesses: str | None = None

    def lacks(self, settings: KvSettings) -> str | None:
        """Why it cannot run with these settings, as one sentence; None when it can."""
        if not self.gpu and settings.device != "cpu":
            return f"{self.setting} runs on the CPU only, not on device {settings.device}"
        if self.kv_dtypes is not None and settings.kv_dtype not in self.kv_dtypes:
            allowed = ", ".join(sorted(self.kv_dtypes))
            return f"{self.setting} does not read KV of {settings.kv_dtype}; allowed: {allowed}"
        if self.codecs is not None and settings.codec not in self.codecs:
            allowed = ", ".join(sorted(self.codecs))
            return f"{self.setting} does not go through codec {settings.codec}; allowed: {allowed}"
        if self.no_guesses is not None and settings.speculates:
            return f"{self.setting} does not go with speculative decoding: {self.no_guesses}"
        return None


CAPABILITIES = (
    KvCapability(
        setting="kv_dtype int8",
        chosen=lambda settings: settings.kv_dtype == INT8,
        kv_dtypes=None,
        codecs=frozenset({"identity"}),
        gpu=False,
    ),
    KvCapability(
        setting="kv_selection quest",
        chosen=lambda settings: settings.selection == QUEST,
        kv_dtypes=frozenset({"float32", INT8}),
        codecs=None,
        gpu=False,
        no_guesses="guesses are verified with all of the KV, so they would change tokens",
    ),
    KvCapability(
        setting="kv_selection morph",
        chosen=lambda settings: settings.selection == MORPH,
        kv_dtypes=frozenset({"float32", INT8}),
        codecs=None,
        gpu=False,
        no_guesses="KV is dropped by the attention of tokens that are fed one by one",
    ),
)
"""All of KV in the weights' own type goes with everything and has no row."""


def kv_fault(settings: KvSettings) -> str | None:
    """The first reason why settings do not go together, as one sentence; None when they do."""
    for capability in CAPABILITIES:
        if capability.chosen(settings) and (lack := capability.lacks(settings)) is not None:
            return lack
    return None


def kv_settings(config: WorkerConfig) -> KvSettings:
    """What a worker's settings say about its KV."""
    return KvSettings(
        kv_dtype=config.kv_dtype or config.dtype,
        selection=FULL if config.kv_selection is None else config.kv_selection.policy,
        device=config.device,
        codec=config.codec,
        speculates=config.speculative is not None,
    )


def kv_budget(config: WorkerConfig) -> KvBudget | None:
    """How many tokens of a sequence may have KV; None for all."""
    selection = config.kv_selection
    if selection is None or selection.policy != MORPH:
        return None
    return KvBudget(selection.budget_tokens, selection.window_tokens)
