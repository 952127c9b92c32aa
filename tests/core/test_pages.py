"""The pages on adding a method, a family and a kernel: what they name is there, and what they say holds for what ships."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse.methods import PROCESSORS

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "torch-ext" / "vidsparse_kernels"
PAGES = ("add_a_method", "add_a_family", "add_a_kernel")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_path_is_there(name: str) -> None:
    paths = re.findall(r"`([\w./{},]+?/[\w./{},]*?)`", page(name))
    assert len(paths) > 4
    for path in paths:
        if "{" in path:
            before, inside, after = re.split(r"[{}]", path)
            found = [before + part + after for part in inside.split(",")]
        else:
            found = [path]
        for each in found:
            homes = (
                ROOT,
                ROOT / "vidsparse",
                ROOT / "vidsparse" / "processors",
                KERNELS.parent,
                KERNELS,
                ROOT / "pipelines",
            )
            if "NAME" not in each:
                assert any((home / each).exists() for home in homes), each


def test_the_method_of_the_page_works(build_transformer: Any, forward: Any) -> None:
    """It is run as printed, attached to a real class, and its mask is the rule in its docstring, token by token."""
    code = re.search(r"```python\n(.*?)```", page("add_a_method"), re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    processor_class = names["FramesProcessor"]
    # Step 3.
    PROCESSORS["frames"] = processor_class
    try:
        processor = processor_class(radius=1, warmup_steps=0, min_tokens=0, guard=0.5)
        model = build_transformer()
        with torch.no_grad():
            stock = forward(model, frames=6)
            model.set_attn_processor(processor)
            assert not torch.allclose(forward(model, frames=6), stock)
            assert processor.report().sparse_density == pytest.approx(16 / 36, abs=1e-4)
            assert processor.report().least_agreement is not None
            model.set_attn_processor(processor_class(radius=5, warmup_steps=0, min_tokens=0))
            assert torch.allclose(forward(model, frames=6), stock, atol=1e-5)
        grid = names["LatentGrid"](4, 2, 3)
        mask, _ = processor.build_mask(processor.layout(grid), None)
        for query in range(24):
            for key in range(24):
                assert bool(mask.to_dense()[0, 0, query // 6, key // 6]) == (abs(query // 6 - key // 6) <= 1)
    finally:
        del PROCESSORS["frames"]


def test_every_family_has_its_case() -> None:
    from vidsparse.processors.families import FAMILIES
    from vidsparse.testing import CASES

    built = {type(case.build()).__name__ for name, case in CASES.items() if name in ("Mochi", "Wan", "Flux")}
    assert {"MochiTransformer3DModel", "WanTransformer3DModel", "FluxTransformer2DModel"} == built
    source = (ROOT / "vidsparse" / "testing.py").read_text()
    assert all(any(name in source for name in family.model_classes) for family in FAMILIES)


FOLDERS = sorted(path.name for path in KERNELS.iterdir() if (path / "api.py").exists())


@pytest.mark.parametrize("op", FOLDERS)
def test_every_kernel_follows_the_page(op: str) -> None:
    from vidsparse.cli.self_test import CHECKS

    assert (KERNELS / op / "reference.py").exists()
    assert op in CHECKS, "step 5"
    tests = {path.stem for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    benches = {path.stem for path in (ROOT / "scripts").glob("bench_*.py")}
    assert f"test_{op}" in tests
    bench = {
        "block_sparse_attention": "bench_block_sparse",
        "sampled_error": "bench_guard",
        "permutation": "bench_clustering",
    }
    assert bench.get(op, f"bench_{op}") in benches
