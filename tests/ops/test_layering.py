"""vidsparse_kernels stands alone: torch only, Triton optional and loaded late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kernels" / "torch-ext" / "vidsparse_kernels"

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vidsparse_kernels import BlockMask, available_backends, block_sparse_attention
from vidsparse_kernels.testing import make_qkv
assert available_backends() == ("reference", "sdpa"), available_backends()
q, k, v = make_qkv(seq_len_q=70)
mask = BlockMask.full(70, 70, q_block_size=64, kv_block_size=64)
for backend in available_backends():
    assert block_sparse_attention(q, k, v, mask, backend=backend).shape == q.shape
try:
    block_sparse_attention(q, k, v, mask, backend="triton")
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("no error")
"""


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(PACKAGE.parent)}
    )
    assert result.returncode == 0, result.stderr


def test_works_without_triton():
    run(WITHOUT_TRITON)


def test_import_does_not_load_triton_kernels():
    run("import sys, vidsparse_kernels; assert 'vidsparse_kernels.block_sparse_attention.forward' not in sys.modules")


OTHER_NAME = """
import importlib.util, pkgutil, sys
sys.modules["vidsparse_kernels"] = sys.modules["vidsparse"] = None
where = sys.argv[1]
spec = importlib.util.spec_from_file_location("loaded_from_the_hub", where + "/__init__.py", submodule_search_locations=[where])
package = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = package
spec.loader.exec_module(package)
for module in pkgutil.walk_packages(package.__path__, spec.name + "."):
    importlib.import_module(module.name)
import torch
testing = importlib.import_module(spec.name + ".testing")
q, k, v = (x.requires_grad_() for x in testing.make_qkv(seq_len_q=70))
mask = package.BlockMask.full(70, 70, q_block_size=64, kv_block_size=64)
package.block_sparse_attention(q, k, v, mask).sum().backward()
with torch.no_grad():
    package.block_sparse_attention(q, k, v, mask)
"""


def test_works_under_another_name_without_ours():
    """As a Hub kernel, which is loaded under a generated name: every import inside has to be relative."""
    command = [sys.executable, "-c", OTHER_NAME, str(PACKAGE)]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr


def test_no_import_by_a_name_in_a_string():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "vidsparse_kernels." not in text and "import_module(" not in text and "__import__" not in text, (
            path.name
        )


OPTIONAL = {"flash_attn"}
"""Packages that a function may import when it runs, because only who calls it needs them."""


def imports(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of the absolute imports, and whether each is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], in_function
        yield from imports(node, in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_imports_only_itself_torch_triton_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in PACKAGE.rglob("*.py"):
        for name, in_function in imports(ast.parse(path.read_text())):
            assert name in (allowed | OPTIONAL if in_function else allowed), f"{path.name} imports {name}"


def test_optional_packages_are_seen_at_module_level():
    source = "import flash_attn.cute\nif True:\n    from flash_attn import x\ndef f():\n    import flash_attn\n"
    assert list(imports(ast.parse(source))) == [("flash_attn", False), ("flash_attn", False), ("flash_attn", True)]


def test_kernels_never_import_the_reference():
    for path in (PACKAGE / "block_sparse_attention").glob("*.py"):
        if path.stem in ("forward", "sdpa", "configs"):
            assert "reference import" not in path.read_text()
