"""Dependencies point one way: vidsparse_kernels <- vidsparse <- vidsparse_pipelines <- vidsparse_lora."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "vidsparse_kernels": ROOT / "kernels/torch-ext/vidsparse_kernels",
    "vidsparse": ROOT / "vidsparse",
    "vidsparse_pipelines": ROOT / "pipelines/vidsparse_pipelines",
    "vidsparse_lora": ROOT / "lora/vidsparse_lora",
}
ORDER = list(SOURCES)


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Imported top-level packages: name, line, whether inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                names = [child.module]
            for name in names:
                yield name.split(".")[0], getattr(child, "lineno", 0), inside
            deeper = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, inside or deeper)

    return walk(tree, False)


def violations(package: str, path: Path, text: str) -> list[str]:
    later = ORDER[ORDER.index(package) + 1 :]
    in_cli = package == "vidsparse" and path.relative_to(SOURCES["vidsparse"]).parts[0] == "cli"
    found = []
    for name, line, lazy in imports(ast.parse(text)):
        if name in later and not (in_cli and lazy):
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        if package == "vidsparse_kernels" and name in ORDER:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}; the kernels package uses relative imports")
    return found


@pytest.mark.parametrize("package", ORDER)
def test_dependencies_point_one_way(package):
    files = sorted(SOURCES[package].rglob("*.py"))
    assert files
    found = [v for path in files for v in violations(package, path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_the_check_sees_violations():
    path = SOURCES["vidsparse"] / "layout.py"
    assert violations("vidsparse", path, "def f():\n    from vidsparse_pipelines import x\n")
    cli = SOURCES["vidsparse"] / "cli" / "main.py"
    assert violations("vidsparse", cli, "import vidsparse_pipelines.load\n")
    assert not violations("vidsparse", cli, "def f():\n    import vidsparse_lora\n")
    assert violations("vidsparse_kernels", SOURCES["vidsparse_kernels"] / "x.py", "import vidsparse\n")
