"""Edge: `tandem demo`: starts everything, asks one question, shows where the time went, stops everything."""

import argparse

DEFAULT_QUESTION = "Why is the sky blue? Answer in two sentences."
DEFAULT_MAX_TOKENS = 64


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "demo", help="one question through a whole cluster", description="Starts, asks, shows, stops."
    )
    parser.add_argument("question", nargs="?", default=DEFAULT_QUESTION)
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Exit code 0 when the answer came. Raises TandemError."""
    from cluster.demo import show_one_answer
    from cluster.interruptible import run_interruptible
    from tandem.errors import InvalidRequest

    if not 1 <= chosen.max_tokens <= 4096:
        raise InvalidRequest(f"--max-tokens must be 1 to 4096, not {chosen.max_tokens}.", "--max-tokens")
    return run_interruptible(show_one_answer(chosen.question, chosen.max_tokens))
