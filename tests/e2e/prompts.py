"""Chat prompts of 30 to 1,200 tokens, from passages written for these tests."""

from pathlib import Path

PASSAGES = tuple(
    " ".join(passage.split())
    for passage in (Path(__file__).parent / "passages.txt").read_text().split("\n\n")
)

QUESTIONS = (
    "What is this text about?",
    "Summarise the text in one sentence.",
    "Name the most important fact.",
    "Who or what is mentioned first?",
    "Write a title for it.",
    "Explain it to a child.",
)


def chat_prompts() -> list[list[dict[str, str]]]:
    """24 conversations: from a bare question up to eighteen passages, some with several turns."""
    prompts: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Write a haiku about the sea."}],
        [
            {"role": "system", "content": "You answer with one word."},
            {"role": "user", "content": "Which animal barks?"},
        ],
        [
            {"role": "user", "content": "My name is Ada. Remember it."},
            {"role": "assistant", "content": "I will remember your name, Ada."},
            {"role": "user", "content": "What is my name?"},
        ],
    ]
    for index in range(20):
        count = (1, 2, 3, 1, 5, 2, 4, 1, 7, 3, 2, 9, 1, 4, 12, 2, 6, 15, 3, 18)[index]
        passages = [PASSAGES[(index + step) % len(PASSAGES)] for step in range(count)]
        question = QUESTIONS[index % len(QUESTIONS)]
        prompts.append([{"role": "user", "content": "\n\n".join([*passages, question])}])
    return prompts
