"""A worker that is started by hand says in a sentence why it cannot serve."""

import socket
from pathlib import Path

import pytest

from decode_worker.service import DecodeWorker
from engine.worker_process import by_hand
from tandem.worker import Role
from tests.engine.tiny_models import family_configs, random_model


def test_a_port_that_is_taken_is_a_sentence_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_hand, "configure_logging", lambda: None)
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--model", str(tmp_path), "--pool-blocks", "8", "--threads", "1", "--port", str(port)]
        code = by_hand.run_by_hand(Role.DECODE, DecodeWorker.open, options)
    assert code == 2
    assert f"gRPC port 127.0.0.1:{port} cannot be bound.\n" in capsys.readouterr().err
