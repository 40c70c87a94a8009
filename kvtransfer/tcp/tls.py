"""Edge: TLS for data connections: a thread for each carries its bytes between the wire and a socket pair.

Whoever holds the near end of the pair sees a plain socket that breaks when the connection does, so what moves
blocks knows nothing of TLS, and without TLS there is no thread and no copy more. Both sides must show a
certificate of the cluster's authority. The files are read for every connection: renewed ones need no restart.
"""

import contextlib
import socket
import ssl
import threading
from concurrent.futures import Future

from kvtransfer.tcp.tls_relay import relay
from tandem.errors import ConfigError, TransferError, TransferFault
from tandem.worker_config import TlsConfig

PAIR_BYTES = 1 << 20
"""Asked of the system for each direction of the pair, so that a large read or write wakes few threads."""

JOIN_S = 1.0
"""Bound of the wait for threads whose sockets are shut down."""

_READY = b"\1"
"""Sent by the accepting side when it trusts the other one, which TLS 1.3 alone would learn of only later."""


class Tunnel:
    """One TLS connection; `opened` gives the near end of its pair, a blocking socket, or a TransferError."""

    def __init__(self, wire: socket.socket, files: TlsConfig, server_side: bool, within_s: float) -> None:
        """Takes `wire`, which is connected, over; the handshake is bounded by `within_s`."""
        self.opened: Future[socket.socket] = Future()
        self.opened.set_running_or_notify_cancel()
        self._near, self._far = _pair()
        self._wire = wire
        self._files = files
        self._server_side = server_side
        self._within_s = within_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-tls", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ends it soon; idempotent."""
        self._stopped.set()
        for end in (self._wire, self._near):
            with contextlib.suppress(OSError):
                # One that is closed or broke by itself has ended already. Not ssl's own shutdown, which would
                # take the connection away under its thread.
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def discard(self) -> None:
        """Ends one whose near end nobody took."""
        self.stop()
        self._near.close()

    def join(self, within_s: float) -> None:
        """Waits for its thread."""
        self._thread.join(within_s)

    def _run(self) -> None:
        with self._far:
            try:
                wire = self._shaken()
            except (ConfigError, OSError, ValueError) as error:
                self._wire.close()
                self._near.close()
                late = isinstance(error, TimeoutError)
                fault = TransferFault.TIMEOUT if late else TransferFault.TLS
                self.opened.set_exception(TransferError(fault, f"The TLS handshake failed: {error}"))
                return
            with wire:
                self.opened.set_result(self._near)
                if not self._stopped.is_set():
                    relay(wire, self._far)

    def _shaken(self) -> ssl.SSLSocket:
        """After the handshake. Raises ConfigError for our files, OSError, and ValueError when stopped."""
        self._wire.settimeout(self._within_s)
        context = _context(self._files, self._server_side)
        self._wire = wire = context.wrap_socket(self._wire, self._server_side, do_handshake_on_connect=False)
        wire.do_handshake()
        if self._server_side:
            wire.sendall(_READY)
        elif wire.recv(len(_READY)) != _READY:
            raise ConnectionResetError("the source hung up")
        return wire


class Tunnels:
    """The TLS connections of one transport."""

    def __init__(self, files: TlsConfig) -> None:
        """Raises ConfigError, naming the files, when they cannot be read or do not belong together."""
        self._files = files
        self._running: set[Tunnel] = set()
        self._lock = threading.Lock()
        for server_side in (True, False):
            _context(files, server_side)

    def begin(self, wire: socket.socket, server_side: bool, within_s: float) -> Tunnel:
        """Begins a handshake on a connected socket, which it takes over; from any thread."""
        tunnel = Tunnel(wire, self._files, server_side, within_s)
        with self._lock:
            self._running = {known for known in self._running if not known.over} | {tunnel}
        return tunnel

    def close(self) -> None:
        """Ends all connections and their threads; blocks for a moment."""
        for tunnel in self._running:
            tunnel.stop()
        for tunnel in self._running:
            tunnel.join(JOIN_S)
        self._running.clear()


def _context(files: TlsConfig, server_side: bool) -> ssl.SSLContext:
    """Shows our certificate, and wants one of the authority. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Workers are known by their tickets, not by names: addresses of pods are in no certificate.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        # A ticket would lie unread on an idle connection, which then does not look idle.
        context.num_tickets = 0
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
        context.load_verify_locations(files.ca)
    except (OSError, ValueError) as error:
        message = f"tls: {files.cert}, {files.key} and {files.ca} cannot be used: {error}"
        raise ConfigError(message) from error
    return context


def _no_password() -> str:
    """Asked for when the key is encrypted; by itself, OpenSSL would ask the terminal."""
    raise ValueError("the key is encrypted")


def _pair() -> tuple[socket.socket, socket.socket]:
    made = socket.socketpair()
    for end in made:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAIR_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PAIR_BYTES)
    return made
