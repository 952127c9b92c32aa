"""Positions stretched along time: what each kind does to the angles, and that generating does as training did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse_lora import length_extension
from vidsparse_pipelines.load import load_pipeline
from vidsparse_pipelines.lora import LoraSpec, read_training
from vidsparse_pipelines.rope import stretch_time
from vidsparse_pipelines.testing import tiny_wan_pipeline


def test_angles() -> None:
    plain, even, ntk = (tiny_wan_pipeline().transformer for _ in range(3))
    stretch_time(even, "interpolation", 4.0)
    stretch_time(ntk, "ntk", 4.0)
    dim = plain.rope.t_dim
    for name in ("freqs_cos", "freqs_sin"):
        before, after, other = (getattr(m.rope, name) for m in (plain, even, ntk))
        assert torch.equal(before[:, dim:], after[:, dim:]) and torch.equal(before[:, dim:], other[:, dim:])
        assert torch.allclose(after[::4, :dim], before[: len(before) // 4, :dim], atol=1e-6)  # frame 4k where k was
        assert torch.equal(other[:, :2], before[:, :2])  # the highest frequency as it was
        lowest = 10_000 ** (-(dim - 2) / dim)
        wanted = torch.arange(len(before), dtype=torch.float64) * lowest / 4
        wanted = wanted.cos() if name == "freqs_cos" else wanted.sin()
        assert torch.allclose(other[:, dim - 1].double(), wanted, atol=1e-6)  # the lowest four times as slow


def test_generating_does_as_training_did(lengthen: Any, tiny_model: Path, tmp_path: Path) -> None:
    config = lengthen(max_steps=1, rope="interpolation", teacher_frames=9)
    file = length_extension.train(config, lambda _: None)
    training = read_training(str(file))
    assert training is not None and training["rope"] == {"kind": "interpolation", "factor": pytest.approx(5 / 3)}
    loaded = load_pipeline(str(tiny_model), dtype="float32", device="cpu", loras=(LoraSpec(str(file)),))
    expected = tiny_wan_pipeline().transformer
    before = expected.rope.freqs_cos.clone()
    stretch_time(expected, "interpolation", 5 / 3)
    assert torch.equal(loaded.pipe.transformer.rope.freqs_cos, expected.rope.freqs_cos)
    assert not torch.allclose(before, expected.rope.freqs_cos, atol=1e-3)
    plain = length_extension.train(lengthen(max_steps=1, output_dir=str(tmp_path / "plain")), lambda _: None)
    with pytest.raises(ModelLoadError, match="positions stretched differently"):
        both = (LoraSpec(str(file)), LoraSpec(str(plain)))
        load_pipeline(str(tiny_model), dtype="float32", device="cpu", loras=both)


def test_refusals(lengthen: Any) -> None:
    with pytest.raises(ConfigError, match="`rope` must be one of interpolation, ntk, got 'yarn'"):
        lengthen(rope="yarn")
    with pytest.raises(ConfigError, match="set `teacher_weight` to 0"):
        lengthen(rope="ntk", teacher_weight=1.0)
    with pytest.raises(ConfigError, match="needs `rope`"):
        lengthen(rope_factor=2.0)
    with pytest.raises(ConfigError, match="`rope_factor` must be at least 1"):
        stretch_time(tiny_wan_pipeline().transformer, "ntk", math.nan)
    with pytest.raises(ConfigError, match="not those of Linear"):
        stretch_time(torch.nn.Linear(1, 1), "ntk", 2.0)
