"""Pure: what cluster.yaml may say of how tokens are written: by guessing them, and from which KV."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config_section import Section


class KvSelectionSection(Section):
    """Which of its KV a decode worker reads, or keeps."""

    policy: Literal["full", "quest", "morph"] = Field(
        default="full",
        description="`full` reads all; `quest` reads, in all but the first two layers, the blocks whose keys "
        "may score highest; `morph` gives up KV beyond a budget (both: CPU only, KV of float32 or int8, no "
        "speculative decoding).",
    )
    pages: int = Field(
        default=64,
        ge=2,
        le=1_048_576,
        description="Blocks that `quest` reads for a token and KV head, the newest among them.",
    )
    budget_tokens: int = Field(
        default=1024,
        ge=2,
        le=1_048_576,
        description="Tokens of a sample that have KV with `morph`, once it wrote `window_tokens` here; two "
        "windows or more.",
    )
    window_tokens: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="The newest tokens, which `morph` keeps and whose attention says which others it keeps.",
    )
    fusion: Literal["sum", "max"] = Field(
        default="sum",
        description="How `morph` scores a token: by the `sum` or the largest (`max`) of the attention that "
        "each of the window's tokens gives it.",
    )

    @model_validator(mode="after")
    def _has_room_for_two_windows(self) -> "KvSelectionSection":
        if self.budget_tokens < 2 * self.window_tokens:
            raise ValueError(
                f"budget_tokens: {self.budget_tokens} is less than two windows; allowed: "
                f"{2 * self.window_tokens} or more"
            )
        return self


class SpeculativeSection(Section):
    """Guessing tokens and verifying several in one step (speculative decoding), on decode workers."""

    method: Literal["none", "ngram", "draft_model", "medusa", "eagle"] = Field(
        default="none",
        description="Who guesses: `ngram` looks the last tokens up in the text so far, `draft_model` is a "
        "smaller model, `medusa` and `eagle` are heads trained for the model.",
    )
    tokens: int = Field(default=8, ge=1, le=64, description="Most guesses of a sequence verified in a step.")
    source: str | None = Field(
        default=None,
        max_length=4096,
        description="The draft model (named as `model.source` is; same tokenizer) or the heads' folder.",
    )
    acceptance: Literal["exact", "rejection"] = Field(
        default="exact",
        description="`exact` gives the very tokens of a cluster that does not guess; `rejection`, for "
        "`draft_model`, gives sampled output of the same distribution with more guesses accepted.",
    )
    min_ngram: int = Field(default=2, ge=1, le=16, description="Shortest match of `ngram`, in tokens.")
    max_ngram: int = Field(default=4, ge=1, le=16, description="Longest match of `ngram`, in tokens.")
    pool_blocks: int = Field(
        default=1024, ge=1, le=10_000_000, description="KV pool of a draft model or EAGLE head, in blocks."
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "SpeculativeSection":
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram: {self.min_ngram} is more than max_ngram; allowed: 1 to {self.max_ngram}"
            )
        if self.method in ("draft_model", "medusa", "eagle") and self.source is None:
            raise ValueError(f"source: method {self.method} needs one; allowed: a model or folder")
        if self.acceptance == "rejection" and self.method != "draft_model":
            raise ValueError("acceptance: rejection needs method draft_model; allowed: exact")
        return self
