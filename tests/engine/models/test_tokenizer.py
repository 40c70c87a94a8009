"""Text to ids and back: as the model's own tokenizer does it, and piece by piece as in one go."""

import json
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from engine.models.gguf_file import GgufFile
from engine.models.gguf_tokenizer import build_tokenizer, tokenizer_config
from engine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from tandem.errors import InvalidRequest, ModelError
from tests.engine.models.gguf_files import (
    TEMPLATE,
    add_byte_level_tokenizer,
    add_sentencepiece_tokenizer,
    finish,
)

TEXTS = [
    "hello world",
    " hello",
    "hello  world",
    "12 121 2",
    "naïve café – 你好 👩‍🚀",
    "line\n\nnext\ttab  \r\n end ",
    "",
    "a<think>b",
    "\u0000\x7f",
]


def tokenizer_folder(folder: Path, write: Callable[[gguf.GGUFWriter], None], **config: Any) -> Path:
    """A folder with what the conversion makes of a GGUF file's tokenizer."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    write(writer)
    finish(writer)
    file = GgufFile(folder / "model.gguf")
    build_tokenizer(file).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(file) | config))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("bytes"), add_byte_level_tokenizer))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("pieces"), add_sentencepiece_tokenizer))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@settings(deadline=None, max_examples=400)
@given(ids=st.lists(st.integers(0, 275), max_size=40))
def test_byte_level_pieces_make_up_the_whole(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@settings(deadline=None, max_examples=400)
@given(ids=st.lists(st.integers(0, 290), max_size=40))
def test_sentencepiece_pieces_make_up_the_whole(sentencepiece: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(sentencepiece, ids)) == sentencepiece.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_byte_level_text_survives_the_round_trip(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert "".join(pieces(byte_level, ids)) == text
    assert b"".join(byte_level.token_bytes(token) for token in ids) == text.encode()


def test_characters_are_held_back_until_they_are_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a👩")
    assert pieces(byte_level, ids) == ["a", "", "", "", "👩", ""]
    assert pieces(byte_level, ids[:-1]) == ["a", "", "", "", "�"]


def test_the_unfinished_character_of_byte_fallback_comes_with_the_finish(sentencepiece: Tokenizer) -> None:
    euro = [byte + 3 for byte in "€".encode()]
    assert [sentencepiece.token_bytes(token) for token in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert pieces(sentencepiece, euro) == ["", "", "", "€"]
    assert pieces(sentencepiece, euro[:2]) == ["", "", "��"]


def test_special_tokens_give_no_text_but_have_a_name(byte_level: Tokenizer) -> None:
    assert byte_level.special_ids == {0, 1, 2}
    assert pieces(byte_level, [1, 2]) == ["", "", ""]
    assert byte_level.token_bytes(1) == b"<|im_start|>"
    assert byte_level.eos_ids == (2,)


def test_user_defined_tokens_are_kept_whole_and_visible(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<think>")
    assert len(ids) == 2
    assert byte_level.decode(ids) == "a<think>"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_unknown_ids_have_no_bytes_and_no_text(
    byte_level: Tokenizer, sentencepiece: Tokenizer, token_id: int
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        assert tokenizer.token_bytes(token_id) == b""
        assert pieces(tokenizer, [token_id]) == ["", ""]


def test_smollm_splits_digits_from_each_other_and_from_spaces(byte_level: Tokenizer) -> None:
    """The vocabulary has a token for two spaces and a merge of 1 and 2, which digits do not reach."""
    texts = [byte_level.token_bytes(token) for token in byte_level.encode("  12")]
    assert texts == [b"  ", b"1", b"2"]


def test_rendered_chat_is_not_framed_again(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, add_byte_level_tokenizer, add_bos_token=True))
    assert tokenizer.encode("he")[0] == 1
    assert tokenizer.encode_rendered("<|im_start|>he")[0] == 1
    assert tokenizer.encode_rendered("he") == tokenizer.encode("he")[1:]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_equal_transformers(tmp_path: Path, pre: str, text: str) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_bool("tokenizer.ggml.add_bos_token", False)
        add_byte_level_tokenizer(writer, pre)

    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, write))
    load: Any = transformers.AutoTokenizer.from_pretrained
    reference = load(tmp_path, gguf_file="model.gguf")
    assert tokenizer.encode(text) == reference.encode(text)


def test_llama_bpe_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, lambda writer: add_byte_level_tokenizer(writer, "llama-bpe"))
    assert Tokenizer.load(folder).encode("he")[0] == 1


@pytest.mark.parametrize("text", ["hello world", "hello", "world  hello", "he é – 1", "\n", "hello\nworld"])
def test_sentencepiece_ids_equal_transformers(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, add_sentencepiece_tokenizer))
    reference = transformers.LlamaTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
        reference.encode(text), skip_special_tokens=True
    )


def test_sentencepiece_frames_and_prefixes_by_default(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello")
    assert [sentencepiece.token_bytes(token) for token in ids] == [b"<s>", b" hello"]
    assert sentencepiece.decode(ids) == "hello"


def test_sentencepiece_flags_turn_prefix_and_begin_off(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        add_sentencepiece_tokenizer(writer, add_bos_token=False, add_space_prefix=False)

    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, write))
    ids = tokenizer.encode("hello")
    assert [tokenizer.token_bytes(token) for token in ids] == [b"he", b"llo"]
    assert "".join(pieces(tokenizer, ids)) == "hello"


def test_byte_fallback_tokens_have_their_byte(sentencepiece: Tokenizer) -> None:
    assert b"".join(sentencepiece.token_bytes(token) for token in sentencepiece.encode("B")[1:]) == b" B"


def test_text_with_lone_surrogates_is_an_invalid_request(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        byte_level.encode("a\ud800")


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&\n"}]


def test_chat_is_rendered_up_to_the_answer(byte_level: Tokenizer) -> None:
    assert byte_level.render_chat(CHAT) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi <b>&\n<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ bos_token }}{% for m in messages %}{{ m.content | trim | tojson }},\n{% endfor %}{{ unk_token }}",
        "{%- for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m['content'] }}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ tools is none }}{{ documents is none }}",
    ],
)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer, chat_template=template)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.load(folder).render_chat(CHAT) == expected


def test_the_template_sees_the_given_day(tmp_path: Path) -> None:
    folder = tokenizer_folder(
        tmp_path, add_byte_level_tokenizer, chat_template="{{ strftime_now('%d %b %Y') }}"
    )
    tokenizer = Tokenizer.load(folder, now=lambda: datetime(2031, 5, 6))
    assert tokenizer.render_chat(CHAT) == "06 May 2031"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
    ],
)
def test_a_template_that_refuses_is_an_invalid_request(tmp_path: Path, template: str, message: str) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer, chat_template=template)
    with pytest.raises(InvalidRequest, match=message) as raised:
        Tokenizer.load(folder).render_chat(CHAT)
    assert raised.value.field == "messages"


def test_a_template_file_comes_before_the_configured_one(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer)
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(folder).render_chat(CHAT) == "from the file"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer, chat_template=named)
    assert Tokenizer.load(folder).render_chat(CHAT) == "plain"


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer, chat_template=None)
    with pytest.raises(InvalidRequest, match="has no chat template"):
        Tokenizer.load(folder).render_chat(CHAT)


def test_a_template_that_does_not_compile_is_a_model_error(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer, chat_template="{% for %}")
    with pytest.raises(ModelError, match="cannot be compiled"):
        Tokenizer.load(folder)


def test_the_models_config_says_what_ids_there_are_and_what_ends(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer)
    assert Tokenizer.load(folder).vocabulary_tokens == 270
    (folder / "config.json").write_text('{"vocab_size": 320, "eos_token_id": [2, 0]}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.vocabulary_tokens, tokenizer.eos_ids) == (320, (2, 0))


def test_bad_tokenizer_files_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_saved_limit_on_length_is_lifted(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, add_byte_level_tokenizer)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    text = "".join(random.Random(1).choices("abc", k=50))
    assert len(Tokenizer.load(folder).encode(text)) == 50
