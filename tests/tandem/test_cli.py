"""Edge: the command line: light to start, clear about wrong input, honest exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.main import main, parser

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "ray", "grpc", "redis", "pydantic", "rich", "numpy")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for command in (
        "up",
        "demo",
        "generate",
        "chat",
        "status",
        "bench",
        "profile",
        "plan",
        "simulate",
        "controller",
    ):
        assert f"\n    {command}" in shown


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tandem.cli.main import parser\nparser().format_help()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True, cwd=ROOT)
    assert done.stdout.decode().strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["generate"], ["generate", "x", "--max-tokens", "many"], ["bench"], ["bench", "nothing"]],
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: tandem" in capsys.readouterr().err


def test_a_library_that_only_some_commands_need_is_named(tmp_path: Path) -> None:
    """`make setup` does not install what planning needs."""
    code = (
        "import sys\nsys.modules['scipy'] = None\nfrom tandem.cli.main import main\n"
        "sys.exit(main(['plan', '-f', 'plan.yaml']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    message = "tandem: this needs scipy, which is not installed: pip install 'tandem[plan]'."
    assert done.stderr.decode().strip() == message


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["up", "-f", "/nonexistent.yaml"], 2, "/nonexistent.yaml: cannot be read"),
        (["generate", "x", "--address", "127.0.0.1:1"], 1, "No router answers at 127.0.0.1:1"),
        (["status", "--address", "127.0.0.1:1"], 1, "No router answers at 127.0.0.1:1"),
        (
            ["bench", "serve", "--rate", "1", "--address", "127.0.0.1:1"],
            1,
            "No router answers at 127.0.0.1:1",
        ),
        (["generate", "x", "--max-tokens", "-1"], 2, "--max-tokens must be 0 to"),
        (["generate", "x", "--timeout", "0"], 2, "--timeout must be above 0"),
        (["demo", "--max-tokens", "0"], 2, "--max-tokens must be 1 to 4096"),
        (["bench", "router", "--runs", "0"], 2, "--runs must be positive"),
        (["bench", "router", "--seconds", "nan"], 2, "--seconds must be positive and finite"),
        (["bench", "sim", "--rate", "inf"], 2, "--rate must be positive and finite"),
        (
            ["bench", "sim", "--live", "--trace", "t.csv", "--requests", "-5"],
            2,
            "--requests must be positive",
        ),
        (["bench", "serve", "--rate", "nan"], 2, "--rate must be positive and finite"),
        (["bench", "serve", "--rate", "1", "--length-scale", "nan"], 2, "--length-scale must be positive"),
        (["bench", "serve", "--rate", "1", "--timeout", "0"], 2, "--timeout must be positive"),
        (["bench", "serve", "--rate", "1", "--max-prompt-tokens", "0"], 2, "--max-prompt-tokens must be"),
        (["bench", "serve", "--rate", "1", "--output-tokens", "-1"], 2, "--output-tokens must be"),
        (["bench", "serve", "--rate", "1", "--class", "chat=nan"], 2, "--class 'chat=nan': expected"),
        (["bench", "serve", "--rate", "1", "--slo", "chat=1,-1,1"], 2, "--slo 'chat=1,-1,1': expected"),
        (["controller", "run", "-f", "/nonexistent.yaml"], 2, "/nonexistent.yaml: cannot be read"),
        (["controller", "replay", "log", "-f", "/nonexistent.yaml"], 2, "/nonexistent.yaml: cannot be read"),
    ],
)
def test_error_is_one_sentence_and_an_exit_code(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr().err
    assert shown.startswith("tandem: ")
    assert sentence in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", [["sim"], ["sim", "--live"]], ids=" ".join)
@pytest.mark.parametrize(
    ("trace", "sentence"),
    [
        ("num_prefill_tokens,num_decode_tokens\n", "is empty"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n5,9,9\n2,9,9\n", "is not sorted"),
        (f"{'a' * 200_000}\n", "cannot be read"),
    ],
    ids=["empty", "unsorted", "one long word"],
)
def test_a_trace_that_is_none_is_refused_in_a_sentence(
    command: list[str], trace: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(trace)
    assert main(["bench", *command, "--trace", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("tandem: ")
    assert sentence in shown


def test_every_command_can_be_run() -> None:
    for line in ("up", "demo", "generate x", "chat", "status", "bench serve", "bench router"):
        assert callable(parser().parse_args(line.split()).run)
