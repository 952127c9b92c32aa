"""A tiny random Wan pipeline on disk, and short runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse_lora.config import DistillConfig, LengthExtensionConfig, from_dict
from vidsparse_pipelines.testing import save_tiny_wan


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny-wan")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs: their clips are the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tiny_model: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of a few milliseconds a step: 5 latent frames of 4 x 4 tokens in blocks of 16."""
    return {
        "model": str(tiny_model),
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(cache_dir),
        "num_clips": 4,
        "num_frames": [17],
        "sizes": ["64x64"],
        "method_options": {"density": 0.5, "block_size": 16, "dense_layers": 0},
        "text_length": 32,
        "rank": 2,
        "alpha": 4,
        "max_steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "checkpoint_every": 2,
        "log_every": 1,
        "validate_every": -1,
        "trackers": ["none"],
    }


@pytest.fixture
def lengthen(settings: dict[str, Any]) -> Callable[..., LengthExtensionConfig]:
    return lambda **changes: from_dict(LengthExtensionConfig, {**settings, **changes})


@pytest.fixture
def distill(settings: dict[str, Any]) -> Callable[..., DistillConfig]:
    return lambda **changes: from_dict(DistillConfig, {**settings, **changes})
