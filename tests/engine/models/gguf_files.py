"""Edge: writes small GGUF files the way llama.cpp's converter does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from engine.models.token_text import byte_alphabet

Quant = gguf.GGMLQuantizationType

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a small byte-level vocabulary of 270 tokens."""
    space = "Ġ"
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (space, "w"), (space, space), ("1", "2")]
    tokens = [*SPECIALS, *byte_alphabet(), *(left + right for left, right in merges)]
    tokens += ["<think>", *(f"[PAD{place}]" for place in range(270 - len(tokens) - 1))]
    types = [3] * len(SPECIALS) + [1] * (256 + len(merges)) + [4]
    return tokens, types + [5] * (len(tokens) - len(types)), [f"{left} {right}" for left, right in merges]


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    tokens, types, merges = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def add_sentencepiece_tokenizer(writer: gguf.GGUFWriter, **flags: bool) -> None:
    """A small vocabulary whose merges follow from scores."""
    pieces = ["▁", "▁h", "he", "▁he", "ll", "llo", "▁hello", "▁w", "or", "ld", "▁world", "▁wor", "é"]
    letters = list("abcdehlorw")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*tokens, *pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(letters))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    kinds: Mapping[str, Quant],
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Writes a transformers model; `kinds` maps parts of GGUF tensor names to their types; others are F32."""
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, model.config)
    add_byte_level_tokenizer(writer)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = gguf_name(hf_name)
        values = tensor.float().numpy()
        base = name.split(".")[-2]
        if architecture == "llama" and base in heads:
            values = interleaved(values, heads[base])
        kind = next((kind for part, kind in kinds.items() if part in name and values.ndim == 2), Quant.F32)
        writer.add_tensor(name, stored(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(hf_name: str) -> str:
    if hf_name in _TOP:
        return _TOP[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    base, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[base]}.{suffix}"


def interleaved(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp's permutation of q and k."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def stored(values: npt.NDArray[np.float32], kind: Quant) -> npt.NDArray[Any]:
    """The tensor as the type stores it; of K types, which the library can't write, random blocks."""
    if kind in (Quant.Q4_K, Quant.Q6_K, Quant.Q2_K):
        return random_blocks(values.shape, kind)
    quantised: npt.NDArray[Any] = gguf.quantize(values, kind)
    return quantised


def random_blocks(shape: Sequence[int], kind: Quant) -> npt.NDArray[np.uint8]:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(sum(shape))
    blocks = generator.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.array([0.0008, 0.0005], dtype=np.float16).tobytes(), dtype=np.uint8)
    if kind is Quant.Q4_K:
        blocks[..., :4] = scale
    else:
        blocks[..., -2:] = scale[:2]
    return blocks.reshape(shape[0], -1)
