"""Edge: `tandem generate`: one question, one streamed answer."""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tandem.cli.request_arguments import add_address, add_sampling

if TYPE_CHECKING:
    from tandem.generation import Prompt, Update

MAX_STDIN_CHARACTERS = 4_000_000


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser("generate", help="ask one question", description="Asks a running cluster.")
    parser.add_argument("prompt", help="the question; - reads it from standard input")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without chat template"
    )
    add_address(parser)
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.add_argument("--timeline", action="store_true", help="show where the time went")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Streams the answer to standard output. Raises TandemError."""
    from tandem.cli.request_options import options_of
    from tandem.client import TandemClient

    with TandemClient(chosen.address) as client:
        updates = client.generate(_prompt(chosen), options_of(chosen))
        if chosen.json:
            _print_json(updates)
        else:
            _print_stream(updates, show_timeline=chosen.timeline)
    return 0


def _prompt(chosen: argparse.Namespace) -> "Prompt":
    from tandem.generation import ChatMessage

    text = sys.stdin.read(MAX_STDIN_CHARACTERS) if chosen.prompt == "-" else chosen.prompt
    if chosen.raw:
        return str(text)
    system = [ChatMessage("system", chosen.system)] if chosen.system else []
    return [*system, ChatMessage("user", text)]


def _print_json(updates: "Iterable[Update]") -> None:
    import json

    from tandem.cli.json_output import generation_json

    print(json.dumps(generation_json(list(updates))))


def _print_stream(updates: "Iterable[Update]", *, show_timeline: bool) -> None:
    last: Update | None = None
    for update in updates:
        for delta in update.deltas:
            print(delta.text, end="", flush=True)
        last = update
    print()
    if show_timeline and last is not None:
        from tandem.cli.timeline_table import print_timeline

        print_timeline(last)
