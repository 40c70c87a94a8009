"""Edge: the giving process of the adoption benchmark: `python -m benchmarks.kv_giver BLOCKS BLOCK_BYTES`.

Prints the name of an abstract unix socket, serves the first that connects, and ends with it.
"""

import secrets
import socket
import sys

from kvtransfer.shm.adoption import AdoptablePool
from kvtransfer.shm.adoption_link import AdoptionLink, Kind, serve_one
from tandem.errors import TransferError

TIMEOUT_S = 30.0


def touch(pool: AdoptablePool) -> None:
    """Writes every byte of the pool."""
    size = pool.num_blocks * pool.block_bytes
    pool.window(0, size)[:] = b"\x07" * size


def main() -> None:
    """Serves until the link ends."""
    with (
        AdoptablePool(int(sys.argv[1]), int(sys.argv[2])) as pool,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        touch(pool)
        name = f"tandem-bench-{secrets.token_hex(16)}"
        listener.bind(b"\0" + name.encode())
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        print(name, flush=True)
        connection, _ = listener.accept()
        with connection:
            link = AdoptionLink(connection, pool, TIMEOUT_S)
            try:
                while True:
                    if serve_one(link, pool) is Kind.COMMIT:
                        touch(pool)
            except TransferError:
                return


if __name__ == "__main__":
    main()
