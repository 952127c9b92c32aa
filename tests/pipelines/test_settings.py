"""Settings, presets, snapping, prompts, names, estimates: everything that needs no model."""

import json
from pathlib import Path

import pytest

from vidsparse.errors import ConfigError, OutputError
from vidsparse_pipelines.lora import LoraSpec
from vidsparse_pipelines.model_info import ModelInfo
from vidsparse_pipelines.outputs import is_folder, name_output
from vidsparse_pipelines.presets import all_presets, preset_for, supported_pipelines
from vidsparse_pipelines.progress import StepClock
from vidsparse_pipelines.prompts import misplaced_colors, prompt_notes, read_prompts, slug, unknown_words
from vidsparse_pipelines.settings import GenerateSettings
from vidsparse_pipelines.testing import tiny_tokenizer


def info(temporal: int = 4, multiple: tuple[int, int] = (16, 16), max_position: int | None = 1024) -> ModelInfo:
    preset = preset_for("x", "WanPipeline")
    assert preset is not None
    return ModelInfo("x", Path("x"), "WanPipeline", preset, (), multiple, temporal, max_position, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": -5}, "num_frames"),
        ({"num_frames": 10**7}, "from 1 to 10000"),
        ({"num_frames": 8.5}, "whole number"),
        ({"num_frames": True}, "whole number"),
        ({"height": 0}, "height"),
        ({"width": 10**6}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": "5"}, "guidance_scale"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"seed": -1}, "seed"),
        ({"fps": 0}, "fps"),
        ({"offload": "disk"}, "none, model, group, sequential, auto"),
        ({"dtype": "int8"}, "auto, float32, bfloat16, float16"),
        ({"image": "no/such.png"}, "does not exist"),
    ],
)
def test_bad_values_are_named(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GenerateSettings(**{"prompt": "a cat", **change})


def test_settings_round_trip_through_json() -> None:
    settings = GenerateSettings(
        prompt="ein Käfer", seed=2**40, loras=(LoraSpec("a:b.safetensors", 0.5),), dtype="bf16"
    )
    assert settings.dtype == "bfloat16"
    assert GenerateSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ConfigError, match="'framez' is unknown"):
        GenerateSettings.from_dict({"prompt": "x", "framez": 3})


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("dir/with:colon", "dir/with:colon", 1.0),
        ("dir/with:colon:-2", "dir/with:colon", -2.0),
    ],
)
def test_lora_spec(text: str, path: str, scale: float) -> None:
    assert LoraSpec.parse(text) == LoraSpec(path, scale)


@pytest.mark.parametrize("text", ["", "a:nan", "a:1e9"])
def test_bad_lora_spec(text: str) -> None:
    with pytest.raises(ConfigError):
        LoraSpec.parse(text)


@pytest.mark.parametrize(
    ("asked", "temporal", "legal"), [(300, 4, 301), (301, 4, 301), (1, 4, 1), (2, 4, 5), (12, 8, 17), (85, 6, 85)]
)
def test_frames_snap_up(asked: int, temporal: int, legal: int) -> None:
    assert info(temporal).snap_frames(asked) == legal


def test_size_error_names_the_nearest() -> None:
    info().check_size(480, 832)
    with pytest.raises(ConfigError, match=r"use a height of 480 or 496 and a width of 832\."):
        info().check_size(490, 832)
    with pytest.raises(ConfigError, match=r"height of 16 and a width of 96 or 112"):
        info().check_size(7, 100)


def test_length_limit_of_the_position_encoding() -> None:
    info(max_position=128).check_length(509, 16, 2048)
    with pytest.raises(ConfigError, match="use at most 509"):
        info(max_position=128).check_length(513, 16, 16)
    with pytest.raises(ConfigError, match="use at most 2048"):
        info(max_position=128).check_length(1, 16, 2064)


def test_presets_are_sound() -> None:
    names = [preset.name for preset in all_presets()]
    assert len(names) == len(set(names))
    for preset in all_presets():
        GenerateSettings(
            prompt="x",
            height=preset.height,
            width=preset.width,
            num_frames=preset.num_frames,
            fps=preset.fps,
            num_inference_steps=preset.num_inference_steps,
            guidance_scale=preset.guidance_scale,
            flow_shift=preset.flow_shift,
        )
        assert all(side % 8 == 0 for size in preset.sizes.values() for side in size)
        assert preset.models
    assert "WanPipeline" in supported_pipelines()


@pytest.mark.parametrize(
    ("model", "pipeline", "name"),
    [
        ("vidsparse-tiny", "WanPipeline", "vidsparse-tiny"),
        ("/somewhere/vidsparse-tiny/", "WanPipeline", "vidsparse-tiny"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", "wan2.1-480p"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "WanPipeline", "wan2.2-ti2v-5b"),
        ("me/finetune", "WanPipeline", "wan2.1-480p"),
    ],
)
def test_preset_is_found_by_name_then_class(model: str, pipeline: str, name: str) -> None:
    preset = preset_for(model, pipeline)
    assert preset is not None and preset.name == name
    assert preset_for("x", "StableDiffusionPipeline") is None


def test_tiny_preset_is_the_models_native_setting() -> None:
    preset = preset_for("vidsparse-tiny", "WanPipeline")
    assert preset is not None
    assert (preset.height, preset.width, preset.num_frames, preset.fps) == (64, 96, 81, 16)
    assert (preset.num_inference_steps, preset.guidance_scale, preset.flow_shift) == (20, 4.0, 3.0)
    assert preset.sizes == {"small": (64, 96), "large": (96, 160)}


def test_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# title\n\n  a cat \n#no\nb\u00e4r\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "b\u00e4r"]
    path.write_text("# only\n\n")
    with pytest.raises(ConfigError, match="has no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(path)
    for missing in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_prompts(missing)


def test_unknown_words_are_listed_once_in_order() -> None:
    words = unknown_words(tiny_tokenizer(), "A zebra, a red Walrus and a zebra moves")
    assert words == ["zebra", "Walrus", "and"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Cat, on grass!", "a-cat-on-grass"),
        ("猫", "video"),
        ("word " * 30, "-".join(["word"] * 9)),
        ("x" * 80, "x" * 48),
    ],
)
def test_slug(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_output_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_folder("out") and is_folder("out/") and not is_folder("a/b.mp4")
    assert name_output("a/b.gif", "cat", 1, 5) == Path("a/b.gif")
    assert name_output(None, "a cat", 7, 5) == Path("a-cat-seed7.mp4")
    assert name_output("out", "a cat", 7, 1, 3) == Path("out/003-a-cat-seed7.png")
    Path("a-cat-seed7.mp4").touch()
    assert name_output(None, "a cat", 7, 5) == Path("a-cat-seed7-2.mp4")
    with pytest.raises(OutputError, match="give --output a folder"):
        name_output("b.mp4", "cat", 1, 5, 0)


def test_clock_keeps_kinds_apart() -> None:
    clock = StepClock()
    assert clock.estimate(["dense"]) is None
    clock.add("dense", 100.0)  # pays for warm-up
    first = clock.estimate(["dense", "sparse"])
    assert first is not None and first.seconds == 200 and first.at_most
    clock.add("dense", 10.0)
    clock.add("dense", 12.0)
    second = clock.estimate(["dense", "sparse", "sparse"])
    assert second is not None and second.seconds == 33 and second.at_most
    clock.add("sparse", 2.0)
    third = clock.estimate(["sparse", "sparse", "dense"])
    assert third is not None and third.seconds == 15 and not third.at_most


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red cat", []),
        ("a 'red' cat, on grass!", []),
        ("a zebra and a well-known cat's \U0001f388", ["zebra", "and", "well-known", "cat's", "\U0001f388"]),
    ],
)
def test_unknown_words_are_words_and_symbols(prompt: str, words: list[str]) -> None:
    assert unknown_words(tiny_tokenizer(), prompt) == words


def test_prompt_notes() -> None:
    tokenizer = tiny_tokenizer()
    assert prompt_notes(tokenizer, "a red cat", 8) == []
    assert prompt_notes(tokenizer, "red " * 20, 8) == ["The prompt has 21 tokens; the model reads only the first 8."]
    (note,) = prompt_notes(tokenizer, " ".join(f"word{i}" for i in range(30)))
    assert note.endswith("word11, ….")


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("a red circle moves left on a White background", "white background"),
        ("white dotted background", "white background"),
        ("a navy striped star spins", "navy star"),
        ("black background, circle in red", None),
        ("a white circle moves right on a dotted navy background", None),
        ("a red star in front of a white ring that spins on a gray gradient background", None),
    ],
)
def test_colors_in_the_wrong_place(prompt: str, place: str | None) -> None:
    notes = misplaced_colors(prompt)
    assert len(notes) == (place is not None)
    assert place is None or place in notes[0]
