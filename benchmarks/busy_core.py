"""Edge: keeps one core busy until its stdin ends: `python -m benchmarks.busy_core`."""

import math
import select
import sys

ROUND = 50_000
"""Steps between two looks at stdin: some milliseconds."""


def main() -> None:
    """Says that it runs, then computes."""
    print(flush=True)
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        math.fsum(math.sqrt(step) for step in range(ROUND))


if __name__ == "__main__":
    main()
