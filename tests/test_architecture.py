"""The house: ranks, sizes, purity, annotations."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sartor

ROOT = Path(sartor.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RANK = {
    "errors": -1,
    "files": 0,
    "memory": 0,
    "paging": 0,
    "tensors": 0,
    "clock": 0,
    "progress": 0,
    "plan": 1,
    "numerics": 1,
    "model": 1,
    "stages": 2,
    "effort": 3,
    "probing": 4,
    "surgery": 5,
    "carving": 5,
    "pipeline": 6,
    "pictures": 6,
    "data": 7,
    "sources": 7,
    "storage": 7,
    "export": 7,
    "report": 7,
    "evaluate": 8,
    "job": 9,
    "picture_storage": 9,
    "picture_job": 10,
    "map_view": 9,
    "picture_view": 11,
    "picture_evaluate": 12,
    "picture_probe": 11,
    "picture_api": 13,
    "text_exports": 13,
    "picture_exports": 13,
    "doctor": 8,
    "controls": 10,
    "api": 14,
    "arguments": 2,
    "__init__": 15,
    "cli": 16,
}


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Dotted names of Sartor that the file imports, deferred imports counted."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sartor":
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "sartor" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "sartor"}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_ranks_or_its_own_room(file: Path) -> None:
    here = room(file)
    for name in imports(file):
        there = name.split(".")[1] if "." in name else "__init__"
        same_rank_edge = RANK[there] == RANK[here] == RANK["data"]
        assert there == here or RANK[there] < RANK[here] or same_rank_edge, f"{file.name} imports {name}"


def test_numerics_and_model_never_meet() -> None:
    for file in FILES:
        if room(file) in {"numerics", "model"}:
            other = {"numerics": "model", "model": "numerics"}[room(file)]
            assert not any(n.startswith(f"sartor.{other}") for n in imports(file)), file


def test_no_circles() -> None:
    graph = {".".join(("sartor", *f.relative_to(ROOT).with_suffix("").parts)): imports(f) for f in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {path} -> {name}"
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_annotated(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
            assert node.returns is not None, node.name


def test_numerics_is_pure() -> None:
    for file in (ROOT / "numerics").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"Module", "manual_seed", "seed"}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "open"}, file


def test_the_export_list_is_complete_and_sorted() -> None:
    assert list(sartor.__all__) == sorted(sartor.__all__)
    assert all(hasattr(sartor, name) for name in sartor.__all__)
    assert set(sartor.__all__) >= {"compress", "make_plan", "apply_plan", "save", "load", "export"}
