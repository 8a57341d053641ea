"""The house of docs/design.md: nothing imports upward, no circle, and rooms that a newcomer can take in."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Bottom to top; those of one line do not know each other.
ROOMS: dict[str, list[tuple[str, ...]]] = {
    "stella_kernels": [
        ("version", "checks", "environment"),
        ("reference",),
        ("operators",),
        ("triton_kernels.launch",),
        ("triton_kernels.stiefel", "triton_kernels.adapter"),
        ("triton_kernels.report", "triton_kernels"),
        ("functional",),
        ("nn",),
        ("distributed",),
        ("diagnostics",),
        ("optim",),
        ("serving",),
        ("peft",),
        ("verification", "machine"),
        ("__main__",),
        ("",),  # the public names
    ],
    "bench": [
        ("common",),
        ("stiefel",),
        ("adapter",),
        ("traffic", "host", "distributed", "accuracy"),
        ("gpu",),
        ("__main__", ""),
    ],
}


def _modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that ``module`` imports anywhere, in functions too; not the packages on the way there."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                if target in known:
                    yield target
                elif source in known:
                    yield source


def _room(package: str, module: str) -> tuple[int, str]:
    """Its floor and its name."""
    inside = module.removeprefix(package).removeprefix(".")
    rooms = [(floor, room) for floor, rooms in enumerate(ROOMS[package]) for room in rooms]
    fitting = [(len(room), floor, room) for floor, room in rooms if inside == room or inside.startswith(f"{room}.")]
    assert fitting, f"{module} is in no room of docs/design.md"
    _, floor, room = max(fitting)
    return floor, room


@pytest.mark.parametrize("package", ROOMS)
def test_nothing_imports_upward(package: str) -> None:
    known = _modules(package)
    for module, path in known.items():
        floor, room = _room(package, module)
        for target in _imports(module, path, known):
            below, other = _room(package, target)
            assert below < floor or other == room, f"{module} ({room}) imports {target} ({other}), which is not below"


@pytest.mark.parametrize("package", ROOMS)
def test_no_circle(package: str) -> None:
    known = _modules(package)
    graph = {module: set(_imports(module, path, known)) - {module} for module, path in known.items()}
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"import each other: {', '.join(sorted(graph))}"
        graph = {module: targets for module, targets in graph.items() if module not in leaves}


def test_the_rule_sees_what_it_forbids(tmp_path: Path) -> None:
    path = tmp_path / "step.py"
    path.write_text("def later():\n    from ..optim import attach\n\nfrom . import signatures\nimport torch\n")
    known = dict.fromkeys(("stella_kernels.optim.attach", "stella_kernels.operators.signatures"), path)
    found = set(_imports("stella_kernels.operators.step", path, known))
    assert found == set(known)
    assert _room("stella_kernels", "stella_kernels.optim.attach") > _room("stella_kernels", "stella_kernels.operators")


def test_rooms_are_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    folders: dict[Path, int] = {}
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".cpp", ".h", ".cu") and path.exists():
            folders[path.parent] = folders.get(path.parent, 0) + 1
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{name} has {lines} lines: what is its second subject?"
    for folder, files in folders.items():
        assert files <= 14, f"{folder.relative_to(ROOT)} has {files} source files: what is its second subject?"
