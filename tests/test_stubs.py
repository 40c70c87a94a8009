"""The committed stubs are those that `make protos` generates."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_stubs_are_not_stale(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protos/tandem/v1").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    bin_folder = Path(sys.executable).parent
    command += [
        f"--plugin={name}={bin_folder / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    subprocess.run([*command, *map(str, protos)], check=True, timeout=60, capture_output=True)
    generated = sorted(path for path in (tmp_path / "tandem/v1").iterdir())
    assert len(generated) == 4 * len(protos)
    for path in generated:
        committed = ROOT / "tandem/v1" / path.name
        assert committed.read_bytes() == path.read_bytes(), f"{path.name} is stale: run `make protos`"


def test_every_public_message_and_field_is_commented() -> None:
    for proto in (ROOT / "protos/tandem/v1").glob("*.proto"):
        lines = proto.read_text().splitlines()
        for number, line in enumerate(lines):
            text = line.strip()
            opens = text.startswith(("message ", "enum ", "service ", "rpc ", "oneof "))
            field = text.endswith(";") and " = " in text and not text.startswith(("syntax", "//"))
            if opens or field:
                above = lines[number - 1].strip()
                assert above.startswith("//"), f"{proto.name}:{number + 1} has no comment: {text}"
