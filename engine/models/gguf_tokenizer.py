"""Pure: builds tokenizer.json and tokenizer_config.json from a GGUF file's metadata."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from engine.models.gguf_file import GgufFile
from tandem.errors import ModelError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _regex_split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def split() -> pre_tokenizers.PreTokenizer:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    return split


_SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2_split,
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "llama-bpe": _regex_split(_LLAMA3_SPLIT),
    "qwen2": _regex_split(_QWEN2_SPLIT),
}
_BEGINS_BY_DEFAULT = ("llama-bpe",)


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata describes; raises ModelError naming what is unsupported."""
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds = [
        _TokenType(kind) for kind in file.get("tokenizer.ggml.token_type", [_TokenType.NORMAL] * len(tokens))
    ]
    if len(kinds) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens but {len(kinds)} token types.")
    model = file.text("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(file, tokens, kinds)
    else:
        raise ModelError(f"{file.path}: tokenizer {model!r} is not supported; supported: gpt2, llama.")
    for kind, special in ((_TokenType.CONTROL, True), (_TokenType.USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind is kind
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    _frame(tokenizer, file, tokens)
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The tokenizer_config.json: named tokens and, if the file has one, the chat template."""
    tokens = _strings(file, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _begins(file),
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, key in names.items():
        token_id = file.whole(f"tokenizer.ggml.{key}_token_id", -1)
        if 0 <= token_id < len(tokens):
            config[name] = tokens[token_id]
    template = file.text("tokenizer.chat_template", "")
    return config | ({"chat_template": template} if template else {})


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    pre = file.text("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        supported = ", ".join(_SPLITS)
        raise ModelError(f"{file.path}: pre-tokenizer {pre!r} is not supported; supported: {supported}.")
    pairs = [tuple(merge.split(" ")) for merge in _strings(file, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"{file.path}: tokenizer.ggml.merges holds an entry that is not a pair.")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(pair[0], pair[1]) for pair in pairs]
    # Llama 3's vocabulary holds whole words that its merges do not reach.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: Sequence[str], kinds: Sequence[_TokenType]) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens but {len(scores)} scores.")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    mergeable = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind in (_TokenType.NORMAL, _TokenType.USER_DEFINED)
    }
    unknown = file.whole("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_from_scores(mergeable),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", "▁")
    if file.flag("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies, best first.

    SentencePiece joins the neighbours whose union has the highest score; so every way to split a token into
    two tokens is a merge of that token's score.
    """
    ranked = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]


def _frame(tokenizer: Tokenizer, file: GgufFile, tokens: Sequence[str]) -> None:
    """Begin and end tokens around a text, where the file asks for them."""
    begin = file.whole("tokenizer.ggml.bos_token_id", -1) if _begins(file) else -1
    end = (
        file.whole("tokenizer.ggml.eos_token_id", -1)
        if file.flag("tokenizer.ggml.add_eos_token", False)
        else -1
    )
    framing = [(tokens[index], index) for index in (begin, end) if 0 <= index < len(tokens)]
    if not framing:
        return
    before = f"{tokens[begin]} " if begin >= 0 else ""
    after = f" {tokens[end]}" if end >= 0 else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", pair=f"{before}$A{after} $B{after}", special_tokens=framing
    )


def _begins(file: GgufFile) -> bool:
    """llama.cpp's defaults where the file says nothing."""
    default = (
        file.text("tokenizer.ggml.model") == "llama"
        or file.text("tokenizer.ggml.pre", "") in _BEGINS_BY_DEFAULT
    )
    return file.flag("tokenizer.ggml.add_bos_token", default)


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ModelError(f"{file.path}: {key} must be a list of strings.")
    return value
