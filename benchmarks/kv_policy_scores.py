"""Edge: how well a model does a task under a KV policy: numbers it names, and the text it expects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.kv_policy_reader import Policy, Prompt, Reader
from benchmarks.kv_policy_tasks import Haystack
from engine.models.tokenizer import Tokenizer

ANSWER_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Expectation:
    """Of the scored tokens: minus the mean log probability, and the likeliest token at each place."""

    loss: float
    likeliest: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def found_by_depth(
    reader: Reader,
    tokenizer: Tokenizer,
    policy: Policy,
    asked: Sequence[tuple[Prompt, Haystack]],
    plain: Sequence[int],
    before: int,
) -> list[int]:
    """How many numbers are named, digit for digit and greedily, for each place in the haystacks.

    All numbers of all haystacks are asked for side by side, in sequences of their own. `before` tokens are
    fed before the last one of each question: the rest of the question, and `plain` ones before it.
    """
    prompts = [prompt for prompt, haystack in asked for _ in haystack.needles]
    needles = [needle for _, haystack in asked for needle in haystack.needles]
    questions = [tokenizer.encode(needle.question) for needle in needles]
    fed = [[*plain[len(plain) + len(own) - 1 - before :], *own] for own in questions]
    answers: list[list[int]] = [[] for _ in needles]
    with reader.sequences(policy, prompts) as going:
        for offset in range(before + ANSWER_TOKENS):
            now = [(*question, *answer)[offset] for question, answer in zip(fed, answers, strict=True)]
            likeliest = going.feed(now).argmax(1).tolist()
            for question, answer, token in zip(fed, answers, likeliest, strict=True):
                if offset >= len(question) - 1:
                    answer.append(token)
    said = [tokenizer.decode(answer).strip() for answer in answers]
    right = [answer.startswith(needle.number) for answer, needle in zip(said, needles, strict=True)]
    depths = len(asked[0][1].needles)
    return [sum(right[depth::depths]) for depth in range(depths)]


def expectation(
    reader: Reader, policy: Policy, pieces: Sequence[tuple[Prompt, Sequence[int]]], lead: int
) -> Expectation:
    """Of what follows the first `lead` + 1 tokens after each prompt; all are as long.

    The tokens of all pieces are fed side by side, one of each a step.
    """
    fed = torch.tensor([rest for _, rest in pieces])  # [pieces, tokens]
    losses, likeliest = torch.zeros(0), list[int]()
    with reader.sequences(policy, [prompt for prompt, _ in pieces]) as going:
        for offset in range(fed.shape[1] - 1):
            logits = going.feed(fed[:, offset].tolist())
            if offset >= lead:
                follow = logits.log_softmax(1).gather(1, fed[:, offset + 1, None])
                losses = torch.cat((losses, -follow.flatten()))
                likeliest += logits.argmax(1).tolist()
    return Expectation(float(losses.double().mean().item()), tuple(likeliest))
