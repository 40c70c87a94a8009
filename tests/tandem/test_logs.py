"""Logs are one JSON object a line, on stderr."""

import json
import subprocess
import sys

SCRIPT = """
import logging, structlog
from tandem.logs import configure_logging
configure_logging()
structlog.contextvars.bind_contextvars(request_id="r1")
structlog.get_logger("room").info("hello", count=3)
logging.getLogger("other").warning("plain %s", "text")
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger("room").exception("failed")
"""


def test_every_line_is_json_with_level_logger_time_and_request_id() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["hello", "plain text", "failed"]
    assert [line["logger"] for line in lines] == ["room", "other", "room"]
    assert {line["request_id"] for line in lines} == {"r1"}
    assert lines[0]["count"] == 3
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert all(line["timestamp"] and line["level"] for line in lines)


AGAIN = """
import structlog
from structlog.testing import capture_logs
from tandem.logs import configure_logging
configure_logging()
log = structlog.get_logger("room")
log.info("first")
configure_logging()
with capture_logs() as lines:
    log.info("second")
print([line["event"] for line in lines])
"""


def test_a_logger_that_was_used_follows_a_later_configuration() -> None:
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert done.stdout == "['second']\n"
