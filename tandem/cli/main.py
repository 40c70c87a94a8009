"""Edge: the command `tandem`: reads the arguments, runs one command, turns errors into one sentence."""

import argparse
import os
import sys
from collections.abc import Sequence

from tandem.cli import bench, chat, controller, demo, generate, plan, profile, simulate, status, up
from tandem.errors import ConfigError, MendedBy, ModelError, TandemError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_EXTRAS = {"scipy": "plan", "sklearn": "plan", "matplotlib": "plan"}
"""Libraries that only some commands need, and the extra of our package that brings them."""

_COMMANDS = (up, demo, generate, chat, status, bench, profile, plan, simulate, controller)


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    top = argparse.ArgumentParser(
        prog="tandem", description="Serves large language models on prefill and decode workers of their own."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong, 130 interrupted."""
    chosen = parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except TandemError as error:
        print(f"tandem: {error}", file=sys.stderr)
        asked_wrongly = error.mended_by is MendedBy.CLIENT or isinstance(error, ConfigError | ModelError)
        return EXIT_BAD_INPUT if asked_wrongly else EXIT_FAILED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        remedy = f"pip install 'tandem[{_EXTRAS[missing]}]'"
        print(f"tandem: this needs {missing}, which is not installed: {remedy}.", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
