"""Edge: rediss://: the registry behind TLS (a real Valkey behind a terminating proxy), and whom we trust."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from cluster.embedded_store import EmbeddedStore, embedded_store
from cluster.store import Store, StoreAddress, StoreUnavailable

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subprocess.run(
        [
            *command.split(),
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-out",
            certificate,
            "-keyout",
            key,
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return certificate, key


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, ssl.SSLError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def tls_in_front(server: EmbeddedStore, certificate: Path, key: Path) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(server.host, server.port)
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))

    proxy = await asyncio.start_server(relay, "localhost", 0, ssl=context)
    try:
        yield int(proxy.sockets[0].getsockname()[1])
    finally:
        proxy.close()


async def test_registry_behind_tls_is_trusted_by_its_authority_only(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    async with (
        embedded_store(tmp_path / "valkey.log") as server,
        tls_in_front(server, certificate, key) as port,
    ):
        url = f"rediss://localhost:{port}/0"
        trusting = Store(StoreAddress(url, tls_ca=str(certificate), password=server.password))
        doubting = Store(StoreAddress(url, password=server.password))
        assert (await trusting.living()).workers == ()
        with pytest.raises(StoreUnavailable, match="certificate"):
            await doubting.living()
        await trusting.close()
        await doubting.close()
