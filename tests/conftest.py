"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: one thread each, in what they start too. Read when torch is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Imports scripts/NAME.py."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def sparse_attention_pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are so small that dense attention is faster, and so nothing would run sparse.

    Tests of what holds slow masks back ask for the real estimate with the marker `break_even`.
    """
    if "break_even" not in request.keywords:
        # Not by its dotted name: the package exports a function of the same name as this folder.
        sdpa = import_module("vidsparse_kernels.block_sparse_attention.sdpa")
        monkeypatch.setattr(sdpa, "relative_cost", lambda mask, dtype: 0.0)
