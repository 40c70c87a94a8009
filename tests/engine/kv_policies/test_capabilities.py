"""What does not go together is refused in one sentence; the digest tells apart how KV is stored."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.kv_policies.capabilities import KvSettings, kv_fault
from engine.loading import load_engine
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, WorkerConfig
from tests.engine.tiny_models import family_configs, random_model

INT8 = KvSettings("int8")
QUEST = KvSettings("float32", selection="quest")
MORPH = KvSettings("float32", selection="morph")


@pytest.mark.parametrize(
    "settings",
    [
        KvSettings("float32"),
        KvSettings("bfloat16", device="cuda", codec="fp8", speculates=True),
        INT8,
        replace(INT8, speculates=True),
        QUEST,
        replace(QUEST, codec="fp8"),
        replace(QUEST, kv_dtype="int8"),
        replace(MORPH, kv_dtype="int8"),
        replace(MORPH, codec="fp8"),
    ],
)
def test_what_goes_together_is_accepted(settings: KvSettings) -> None:
    assert kv_fault(settings) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(INT8, device="cuda:1"), "kv_dtype int8 runs on the CPU only, not on device cuda:1"),
        (replace(INT8, codec="fp8"), "kv_dtype int8 does not go through codec fp8; allowed: identity"),
        (replace(QUEST, device="cuda"), "kv_selection quest runs on the CPU only, not on device cuda"),
        (
            replace(QUEST, kv_dtype="bfloat16"),
            "kv_selection quest does not read KV of bfloat16; allowed: float32, int8",
        ),
        (
            replace(QUEST, speculates=True),
            "kv_selection quest does not go with speculative decoding: "
            "guesses are verified with all of the KV, so they would change tokens",
        ),
        (replace(MORPH, device="cuda"), "kv_selection morph runs on the CPU only, not on device cuda"),
        (
            replace(MORPH, speculates=True),
            "kv_selection morph does not go with speculative decoding: "
            "KV is dropped by the attention of tokens that are fed one by one",
        ),
        (
            replace(QUEST, kv_dtype="int8", codec="oaken"),
            "kv_dtype int8 does not go through codec oaken; allowed: identity",
        ),
    ],
)
def test_what_does_not_is_named_in_one_sentence(settings: KvSettings, message: str) -> None:
    assert kv_fault(settings) == message


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    """A decode worker with a tiny random Llama."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model(family_configs()["llama"]).save_pretrained(folder)
    return WorkerConfig(WorkerId("w"), Incarnation(1), Role.DECODE, folder, "tiny", pool_blocks=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "int4"}, r"kv_dtype 'int4' is not supported; allowed: int8"),
        (
            {"kv_selection": KvSelectionConfig("alisa")},
            r"kv_selection 'alisa' is unknown; allowed: full, quest, morph",
        ),
        (
            {"kv_selection": KvSelectionConfig("morph", budget_tokens=31, window_tokens=16)},
            r"a budget of two windows or more, not 31 tokens with a window of 16",
        ),
        (
            {"kv_selection": KvSelectionConfig("morph", fusion="mean")},
            r"fusion 'mean' is unknown; allowed: sum, max",
        ),
        ({"kv_selection": KvSelectionConfig("quest", pages=1)}, r"kv_selection needs 2 pages or more, not 1"),
        (
            {"kv_selection": KvSelectionConfig("quest"), "role": Role.PREFILL},
            r"kv_selection is for decode workers",
        ),
        ({"kv_dtype": "int8", "codec": "fp8"}, r"kv_dtype int8 does not go through codec fp8"),
    ],
)
def test_an_engine_refuses_it_before_it_loads(
    config: WorkerConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(replace(config, **changes))  # type: ignore[arg-type]


def test_workers_that_store_kv_otherwise_have_another_digest(config: WorkerConfig) -> None:
    folder: Path = config.model_folder
    plain = compatibility_digest(folder, "float32", 16)
    with load_engine(replace(config, kv_dtype="int8")) as rounded:
        assert rounded.digest == compatibility_digest(folder, "float32", 16, stored_as="int8") != plain
    with load_engine(replace(config, kv_selection=KvSelectionConfig("quest", pages=4))) as selecting:
        assert selecting.digest == plain


def test_a_model_that_sees_a_window_of_tokens_is_refused_with_morph(
    tmp_path: Path, config: WorkerConfig
) -> None:
    """A token's slot would no longer say how far back it is."""
    random_model(family_configs()["mistral-window"]).save_pretrained(tmp_path)
    windowed = replace(config, model_folder=tmp_path, kv_selection=KvSelectionConfig("morph"))
    with pytest.raises(
        ConfigError, match="kv_selection morph does not go with a model whose layers see a window"
    ):
        load_engine(windowed)
