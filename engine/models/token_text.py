"""Pure: what tokens mean as text, for the two kinds of vocabulary: byte-level and SentencePiece-like."""

import codecs
import json
from collections.abc import Collection
from typing import Protocol

from tokenizers import Tokenizer as Backend


class TextStream(Protocol):
    """Text of one output, token by token."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


class TokenText(Protocol):
    """How a vocabulary's tokens become text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an unknown id."""
        ...

    def stream(self) -> TextStream:
        """Starts an output."""
        ...


class ByteLevelText:
    """A vocabulary of byte strings in GPT-2's printable alphabet; text is their concatenation."""

    def __init__(self, backend: Backend, special_ids: Collection[int]) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        bytes_of = byte_alphabet()
        names = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            # The library's decoder does the same: a token with any other character stands for itself.
            spelled = [bytes_of.get(character) for character in token]
            known = [value for value in spelled if value is not None]
            names[token_id] = bytes(known) if len(known) == len(spelled) else token.encode()
        self._names = names
        self._texts = [b"" if token_id in special_ids else name for token_id, name in enumerate(names)]

    @staticmethod
    def fits(backend: Backend) -> bool:
        """Whether this tokenizer decodes bytes and does nothing else."""
        if backend.decoder is None:
            return False
        decoder = json.loads(backend.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        return [step["type"] for step in steps] == ["ByteLevel"]

    def token_bytes(self, token_id: int) -> bytes:
        """See TokenText."""
        return self._names[token_id] if 0 <= token_id < len(self._names) else b""

    def stream(self) -> "_ByteLevelStream":
        """See TokenText."""
        return _ByteLevelStream(self._texts)


class _ByteLevelStream:
    """Python's incremental UTF-8 decoder replaces the same bytes as the tokenizer's."""

    __slots__ = ("_decode", "_texts")

    def __init__(self, texts: list[bytes]) -> None:
        self._texts = texts
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        """See TextStream."""
        return self._decode(self._texts[token_id]) if 0 <= token_id < len(self._texts) else ""

    def finish(self) -> str:
        """See TextStream."""
        return self._decode(b"", True)


class SentencePieceText:
    """A vocabulary of text pieces with byte tokens such as <0x0A> for what they do not cover."""

    def __init__(self, backend: Backend, special_ids: Collection[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._byte_ids = {
            token_id: bytes([int(token[3:5], 16)])
            for token, token_id in backend.get_vocab(with_added_tokens=True).items()
            if _is_byte_token(token)
        }

    def token_bytes(self, token_id: int) -> bytes:
        """See TokenText."""
        if token_id in self._byte_ids:
            return self._byte_ids[token_id]
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return b"" if token is None else token.replace("▁", " ").encode()

    def stream(self) -> "_SentencePieceStream":
        """See TokenText."""
        return _SentencePieceStream(self._backend, self._special_ids, self._byte_ids)


class _SentencePieceStream:
    """Decodes each new piece together with the one before it, which keeps its leading space.

    A run of byte tokens is held until a piece follows: the decoder replaces every byte of a run that is not
    valid as a whole, so no part of it is certain earlier. The library's DecodeStream gives such parts
    away and then fails.
    """

    __slots__ = ("_backend", "_byte_ids", "_context", "_context_length", "_pending", "_special_ids")

    def __init__(self, backend: Backend, special_ids: Collection[int], byte_ids: Collection[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._context: list[int] = []
        self._context_length = 0
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """See TextStream."""
        if token_id in self._special_ids or token_id < 0 or self._backend.id_to_token(token_id) is None:
            return ""
        self._pending.append(token_id)
        return "" if token_id in self._byte_ids else self.finish()

    def finish(self) -> str:
        """See TextStream."""
        text: str = self._backend.decode(self._context + self._pending)
        fresh = text[self._context_length :]
        if self._pending:
            self._context, self._pending = self._pending, []
            self._context_length = len(self._backend.decode(self._context))
        return fresh


def _is_byte_token(token: str) -> bool:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return False
    return all(character in "0123456789abcdefABCDEF" for character in token[3:5])


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, all other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
