"""Dependencies point one way: vidsparse_kernels <- vidsparse <- vidsparse_pipelines <- vidsparse_lora.

Only modules of `vidsparse.cli` import the later packages, and importing `vidsparse.cli` loads none of them.
"""

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


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Imported top-level packages with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def violations(package: str, path: Path, text: str) -> list[str]:
    later = ORDER[ORDER.index(package) + 1 :]
    in_cli = package == "vidsparse" and path.relative_to(SOURCES["vidsparse"]).parts[0] == "cli"
    found = []
    for name, line in imports(ast.parse(text)):
        if name in later and not in_cli:
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
    assert violations("vidsparse", path, "import vidsparse_lora.data\n")
    assert not violations("vidsparse", SOURCES["vidsparse"] / "cli" / "main.py", "import vidsparse_lora\n")
    assert not violations("vidsparse_lora", SOURCES["vidsparse_lora"] / "x.py", "import vidsparse_pipelines\n")
    assert violations("vidsparse_kernels", SOURCES["vidsparse_kernels"] / "x.py", "import vidsparse\n")
