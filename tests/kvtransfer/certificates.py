"""Edge: an authority and worker certificates for tests, made by the openssl program."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tandem.worker_config import TlsConfig

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def make_authority(folder: Path) -> Path:
    """The certificate of a new authority; its key lies beside it."""
    folder.mkdir()
    made = ("-out", "ca.pem", "-keyout", "ca.key")
    _openssl(folder, "req", "-x509", *_KEY, "-days", "2", "-subj", "/CN=authority", *made)
    return folder / "ca.pem"


def make_worker(folder: Path, authority: Path, days: int = 2, trusts: Path | None = None) -> TlsConfig:
    """A worker's files, signed by an authority; it trusts that one or another. `days` -1: expired."""
    folder.mkdir()
    _openssl(folder, "req", *_KEY, "-subj", "/CN=worker", "-out", "cert.csr", "-keyout", "key.pem")
    signer = ("-CA", str(authority), "-CAkey", str(authority.with_suffix(".key")), "-CAcreateserial")
    _openssl(folder, "x509", "-req", "-in", "cert.csr", *signer, "-days", str(days), "-out", "cert.pem")
    return TlsConfig(folder / "cert.pem", folder / "key.pem", trusts or authority)


def _openssl(folder: Path, *command: str) -> None:
    subprocess.run(("openssl", *command), cwd=folder, check=True, capture_output=True, timeout=30)
