"""The rooms import each other only as the design says (docs/architecture.md, "Who may import whom")."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "tandem": set[str](),
    "engine": {"tandem"},
    "kvtransfer": {"tandem"},
    "prefill_worker": {"engine", "kvtransfer", "tandem"},
    "decode_worker": {"engine", "kvtransfer", "tandem"},
    "router": {"tandem"},
    "planner": {"tandem"},
    "cluster": {
        "tandem",
        "engine",
        "kvtransfer",
        "prefill_worker",
        "decode_worker",
        "router",
        "planner",
        "benchmarks",
    },
    "benchmarks": {"tandem", "engine", "kvtransfer", "router", "prefill_worker", "decode_worker", "planner"},
}

ROOMS: tuple[str, ...] = tuple(ALLOWED)

PURE_FOR_ROUTER = {"engine.models.tokenizer", "engine.kv.block_hash", "engine.leg", "engine.transitions"}
"""Modules of other rooms that the router may import; none of them may load torch."""

OWNED = {
    "ray": ("cluster/",),
    "redis": ("cluster/store.py",),
    "cupy": ("kvtransfer/nccl/binding.py",),
    "transformers": ("tests/",),
}

GRPC_SHARED = ("engine/worker_process/worker.py", "router/server.py")

EFFECTS = {"time", "random", "socket", "asyncio", "grpc", "ray", "redis", "torch", "threading", "subprocess"}

GRPC_NAMES = ("service", "client", "interceptor", "grpc_edge")


def _modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if "tandem/v1" not in path.as_posix():
                yield room, path.relative_to(ROOT), ast.parse(path.read_text())


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def _imports_at_start(tree: ast.Module) -> Iterator[str]:
    """Imports that run when the module is imported, not those inside functions."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)


def _is_pure(module: str) -> bool:
    """Whether a module of the tree calls itself pure: the planner simulates what such modules decide."""
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return path.exists() and (ast.get_docstring(ast.parse(path.read_text())) or "").startswith("Pure:")


MODULES = list(_modules())


@pytest.mark.parametrize(("room", "path", "tree"), MODULES, ids=[str(path) for _, path, _ in MODULES])
def test_a_room_imports_only_what_it_may(room: str, path: Path, tree: ast.Module) -> None:
    lazily = path.as_posix().startswith("tandem/cli/")
    for name in _imports_at_start(tree) if lazily else _imports(tree):
        target = name.split(".")[0]
        if target not in ROOMS or target == room:
            continue
        pure = (room == "router" and name in PURE_FOR_ROUTER) or (room == "planner" and _is_pure(name))
        assert pure or target in ALLOWED[room], f"{path} imports {name}"


@pytest.mark.parametrize(("room", "path", "tree"), MODULES, ids=[str(path) for _, path, _ in MODULES])
def test_heavy_libraries_stay_in_their_rooms(room: str, path: Path, tree: ast.Module) -> None:
    for name in _imports(tree):
        owners = OWNED.get(name.split(".")[0])
        assert owners is None or path.as_posix().startswith(owners), f"{path} imports {name}"
        if name.split(".")[0] in ("grpc", "grpc_health", "grpc_reflection", "grpc_status"):
            shared = path.as_posix() in GRPC_SHARED or room == "benchmarks"
            assert shared or any(part in path.stem for part in GRPC_NAMES), f"{path} imports {name}"


@pytest.mark.parametrize(("room", "path", "tree"), MODULES, ids=[str(path) for _, path, _ in MODULES])
def test_a_pure_module_reads_no_clock_and_touches_nothing(room: str, path: Path, tree: ast.Module) -> None:
    docstring = ast.get_docstring(tree) or ""
    if path.name == "__init__.py":
        return
    assert docstring.startswith(("Pure:", "Edge:")), f"{path}: neither Pure: nor Edge:"
    if docstring.startswith("Pure:"):
        effects = {
            "time",
            "random",
            "socket",
            "asyncio",
            "grpc",
            "ray",
            "redis",
            "torch",
            "threading",
            "subprocess",
        }
        used = {name.split(".")[0] for name in _imports(tree)} & effects
        assert not used, f"{path} is called pure and imports {sorted(used)}"


def test_the_router_loads_no_torch() -> None:
    code = "import sys, router.server; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
