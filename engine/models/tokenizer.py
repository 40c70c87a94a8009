"""Pure: between text and token ids, for one model's folder; used by the router, so it never loads torch."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from engine.models.chat_template import ChatTemplate
from engine.models.model_config import read_eos_ids, read_json
from engine.models.token_text import ByteLevelText, SentencePieceText, TokenText
from tandem.errors import InvalidRequest, ModelError


class Tokenizer:
    """The tokenizer, chat template and end tokens of a model. Immutable, so threads and requests share it."""

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any],
        template: ChatTemplate | None,
        vocabulary_tokens: int,
    ) -> None:
        """`config` holds the values of tokenizer_config.json. Use `load` for a folder."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self.vocabulary_tokens = vocabulary_tokens
        """Number of ids that the model knows; all ids in a request lie below it."""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Ids that stand for no text."""
        self.eos_ids: tuple[int, ...] = _named_id(backend, config, "eos_token")
        """Ids that end an output."""
        self._text: TokenText = (
            ByteLevelText(backend, self.special_ids)
            if ByteLevelText.fits(backend)
            else SentencePieceText(backend, self.special_ids)
        )
        self._frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        if "add_bos_token" in config or "add_eos_token" in config:
            begin = _named_id(backend, config, "bos_token") if config.get("add_bos_token") else ()
            end = self.eos_ids if config.get("add_eos_token") else ()
            self._frame = (begin, end)

    @classmethod
    def load(cls, folder: Path, now: Callable[[], datetime] = datetime.now) -> "Tokenizer":
        """Reads a Hugging Face folder; `now` is what chat templates see as the present. Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} lacks tokenizer.json.")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:
            # The library raises bare Exceptions for every kind of bad file.
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}.") from error
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        model = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        size = model.get(
            "vocab_size", max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        if not isinstance(size, int):
            raise ModelError(f"{folder / 'config.json'}: vocab_size must be a whole number, found {size!r}.")
        tokenizer = cls(backend, config, ChatTemplate.load(folder, config, now), size)
        tokenizer.eos_ids = read_eos_ids(folder) or tokenizer.eos_ids
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, framed by begin and end tokens only where the model's tokenizer does so.

        Raises InvalidRequest for text that is not valid Unicode.
        """
        if self._frame is None:
            return self._ids(text, add_special_tokens=True)
        begin, end = self._frame
        return [*begin, *self._ids(text, add_special_tokens=False), *end]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat: special tokens in it are parsed, none are added. Raises InvalidRequest."""
        return self._ids(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat, ending where the assistant's answer begins.

        Raises InvalidRequest when the model has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; send text or token ids.", "messages")
        return self._template.render(messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all ids together, special tokens left out, invalid bytes as U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which need not be whole characters; of a special token, its name.

        Empty for an id that the tokenizer does not know.
        """
        return self._text.token_bytes(token_id)

    def detokenizer(self) -> "IncrementalDetokenizer":
        """A new one, for one output."""
        return IncrementalDetokenizer(self)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:
            # Lone surrogates: valid in a Python string, not in Unicode text.
            raise InvalidRequest("The text is not valid Unicode.", "prompt") from error


class IncrementalDetokenizer:
    """Text of one output, token by token: all pushes and the finish together equal `Tokenizer.decode`.

    Special tokens give no text. Bytes that may still become a character are held back.
    """

    __slots__ = ("_stream",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer._text.stream()

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; may be empty."""
        return self._stream.push(token_id)

    def finish(self) -> str:
        """What was held back, with U+FFFD for what did not become a character."""
        return self._stream.finish()


def _named_id(backend: Backend, config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Id of a token that tokenizer_config.json names, as a tuple of none or one."""
    value = config.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    token_id = backend.token_to_id(content) if isinstance(content, str) else None
    return () if token_id is None else (token_id,)
