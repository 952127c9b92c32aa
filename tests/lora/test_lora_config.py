"""Settings: files, changes, words of refusal, and that every field is documented."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vidsparse.cli.method_options import attribute_help
from vidsparse.errors import ConfigError
from vidsparse_lora.config import MAY_CHANGE, DistillConfig, LengthExtensionConfig, TrainConfig, from_dict, load_config
from vidsparse_lora.session import rate_factor

CONFIGS = Path(__file__).resolve().parents[2] / "lora/vidsparse_lora/configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_say_how_to_launch(path: Path) -> None:
    kind, cls = ("length-extension", LengthExtensionConfig) if "length" in path.stem else ("distill", DistillConfig)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# vidsparse train {kind} lora/vidsparse_lora/configs/{path.name}")
    config = load_config(cls, path)
    assert config.output_dir != TrainConfig.output_dir


def test_every_field_is_documented() -> None:
    for cls in (TrainConfig, LengthExtensionConfig, DistillConfig):
        documented = set(attribute_help(TrainConfig)) | set(attribute_help(cls))
        assert {field.name for field in dataclasses.fields(cls)} <= documented
    assert MAY_CHANGE <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("rank: 8\nlearning_rate: 1e-4\nnum_frames: 33\nmethod_options: {density: 0.3}\n")
    config = load_config(
        LengthExtensionConfig,
        path,
        ["rank=16", "method_options.density=0.5", "method_options.dense_layers=1", "sizes=[64x64, 96x64]", "fps=16"],
    )
    assert (config.rank, config.learning_rate, config.num_frames) == (16, 1e-4, (33,))
    assert config.method_options == {"density": 0.5, "dense_layers": 1}
    assert config.sizes == ("64x64", "96x64") and config.fps == 16.0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rnak": 3}, "`rnak` is no setting of length-extension; did you mean `rank`?"),
        ({"rank": "big"}, "`rank` must be a whole number, got 'big'"),
        ({"rank": True}, "`rank` must be a whole number, got True"),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"ema": 1.0}, r"`ema` must be in \[0, 1\), got 1.0"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0"),
        ({"dtype": "float16"}, "`dtype` must be one of float32, bfloat16, got 'float16'"),
        ({"num_frames": []}, "`num_frames` must list lengths"),
        ({"method_options": 3}, "`method_options` must hold `name: value` pairs"),
        ({"teacher_weight": -1}, "`teacher_weight` must be at least 0"),
    ],
)
def test_refusals(data: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(LengthExtensionConfig, data)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(LengthExtensionConfig, tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("rank: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(LengthExtensionConfig, bad)
    bad.write_text("just words")
    with pytest.raises(ConfigError, match="must hold `name: value` pairs"):
        load_config(LengthExtensionConfig, bad)


def test_learning_rate_over_the_steps() -> None:
    linear = from_dict(TrainConfig, {"max_steps": 10, "lr_warmup_steps": 2, "lr_schedule": "linear"})
    assert [round(rate_factor(linear, s), 3) for s in (0, 1, 5, 9)] == [0.5, 0.9, 0.5, 0.1]
    cosine = from_dict(TrainConfig, {"max_steps": 10, "lr_warmup_steps": 0, "lr_schedule": "cosine"})
    assert rate_factor(cosine, 0) == 1 and rate_factor(cosine, 5) == pytest.approx(0.5)
