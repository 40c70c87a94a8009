"""Edge: what this machine's processor is."""

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

_CPU_FACTS = Path("/proc/cpuinfo")


def processor_name() -> str:
    """As the system calls it, like `AMD EPYC`."""
    return next(_facts("model name"), platform.processor() or platform.machine())


def processor_features() -> str:
    """Digest of the instruction sets that the system lists; empty where it lists none."""
    features = next(_facts("flags"), next(_facts("Features"), ""))
    return hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:16] if features else ""


def _facts(key: str) -> Iterator[str]:
    """The values of a key, one a core."""
    if _CPU_FACTS.exists():
        for line in _CPU_FACTS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                yield value.strip()
