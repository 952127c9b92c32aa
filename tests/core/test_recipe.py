from __future__ import annotations

import json

import pytest

from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid
from vidsparse.methods import PROCESSORS, DenseConfig, RadialConfig, method_options
from vidsparse.recipe import Recipe, TunedFor
from vidsparse.schedule import Schedule


def test_flat_options_reach_config_and_schedule():
    recipe = Recipe.from_options("radial", density=0.3, warmup_steps=2)
    assert recipe.config == RadialConfig(density=0.3, schedule=Schedule(warmup_steps=2, dense_layers=1))
    assert recipe.schedule.dense_layers == 1


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("radial", RadialConfig(variant="release", decay_factor=0.5, block_size=64)),
        Recipe("dense", DenseConfig()),
        Recipe(
            "radial",
            RadialConfig(density=0.25),
            TunedFor(model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", grid=LatentGrid(21, 30, 52), num_steps=50),
        ),
    ],
)
def test_json_round_trip(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["version"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "must be JSON"),
        ("[]", "JSON object"),
        ('{"version": 2, "method": "radial", "config": {}}', "version 1 is needed"),
        ('{"version": 1, "method": "radial"}', "A recipe has method"),
        ('{"version": 1, "method": "radial", "config": {}, "more": 1}', "A recipe has method"),
        ('{"version": 1, "method": "magic", "config": {}}', "one of radial, "),
        ('{"version": 1, "method": "radial", "config": {"density": 3}}', r"in \(0, 1\]"),
        ('{"version": 1, "method": "radial", "config": {"density": "x"}}', r"must be in \(0, 1\], got 'x'"),
        ('{"version": 1, "method": "radial", "config": {}, "tuned_for": {"grid": {"frames": 1}}}', "tuned_for"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_json(text)


def test_unknown_names_list_what_is_known():
    with pytest.raises(ConfigError, match="must be one of radial, .* got 'x'"):
        Recipe.from_options("x")
    with pytest.raises(ConfigError, match="`top_p` is no option of method 'radial'; it takes density, decay_factor"):
        Recipe.from_options("radial", top_p=0.9)
    with pytest.raises(ConfigError, match="must be a RadialConfig, got DenseConfig"):
        Recipe("radial", DenseConfig())


@pytest.mark.parametrize("options", [{"block_size": 8}, {"block_size": 100}, {"sink_frames": -1}, {"decay_factor": 0}])
def test_radial_config_is_checked(options):
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}` must"):
        RadialConfig(**options)


def test_options_of_every_method():
    for method in PROCESSORS:
        options = method_options(method)
        assert {"warmup_steps", "cooldown_steps", "dense_layers", "min_tokens"} <= set(options)
        assert Recipe.from_options(method, **options).method == method
    assert method_options("radial")["decay_factor"] == 0.2


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("density", True, r"in \(0, 1\]"),
        ("density", "a", r"in \(0, 1\]"),
        ("decay_factor", True, "positive and finite"),
        ("decay_factor", "1", "positive and finite"),
        ("sink_frames", 1.5, "whole number of at least 0"),
        ("sink_frames", True, "whole number of at least 0"),
        ("block_size", 32.0, "multiple of 16"),
        ("block_size", "x", "multiple of 16"),
        ("block_size", 8, "multiple of 16"),
        ("block_size", 24, "multiple of 16"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(option, value, rule):
    with pytest.raises(ConfigError, match=rf"^`{option}` must be .*{rule}.*, got {value!r}\.$"):
        Recipe.from_options("radial", **{option: value})


@pytest.mark.parametrize("part", ["schedule", "tuned_for"])
def test_a_part_of_a_recipe_that_is_no_object_is_named(part):
    data = {"version": 1, "method": "radial", "config": {}}
    (data if part == "tuned_for" else data["config"])[part] = "x"
    with pytest.raises(ConfigError, match=f"`{part}` of a recipe must be an object .*, got 'x'"):
        Recipe.from_dict(data)
