"""Edge: `tandem chat`: a conversation; Ctrl-C stops an answer, Ctrl-D ends it."""

import argparse
from typing import TYPE_CHECKING

from tandem.cli.request_arguments import add_address, add_sampling
from tandem.errors import PromptTooLong, TandemError

if TYPE_CHECKING:
    from tandem.client import GenerateOptions, TandemClient
    from tandem.generation import ChatMessage


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "chat", help="hold a conversation", description="Talks to a running cluster."
    )
    add_address(parser)
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Reads questions from the terminal until its end. Raises TandemError when nobody answers at all."""
    from tandem.cli.request_options import options_of
    from tandem.client import TandemClient
    from tandem.generation import ChatMessage

    history = [ChatMessage("system", chosen.system)] if chosen.system else []
    options = options_of(chosen)
    with TandemClient(chosen.address) as client:
        client.status()
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if question:
                history = _turn(client, [*history, ChatMessage("user", question)], options)


def _turn(
    client: "TandemClient", history: "list[ChatMessage]", options: "GenerateOptions"
) -> "list[ChatMessage]":
    """Streams one answer; gives the history after it. A turn that failed is forgotten."""
    from tandem.generation import ChatMessage

    answer = ""
    updates = client.generate(history, options)
    try:
        for update in updates:
            for delta in update.deltas:
                if delta.sample_index == 0:
                    answer += delta.text
                    print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    except TandemError as error:
        hint = " Start a new conversation." if isinstance(error, PromptTooLong) else ""
        print(f"tandem: {error}{hint}")
        return history[:-1]
    finally:
        updates.close()
    print()
    return [*history, ChatMessage("assistant", answer)]
