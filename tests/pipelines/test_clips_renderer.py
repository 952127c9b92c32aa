"""The renderer of the clips: what is drawn is what the spec says."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.grammar import ClipSpec, ObjectSpec, sample_spec
from vidsparse_pipelines.clips.renderer import (
    BACKGROUND_RGB,
    COLOR_RGB,
    FIELDS,
    SIZE_RADIUS,
    Params,
    render,
    sample_params,
)

HEIGHT, WIDTH = 64, 96


def draw(specs: list[ClipSpec], seed: int = 0, frames: int = 21, size=(HEIGHT, WIDTH)) -> tuple[Params, Tensor]:
    params = sample_params(specs, Random(seed), *size)
    return params, render(params, frames, *size)


def one(motion: str = "still", speed: str = "normal", **kwargs) -> ClipSpec:
    fields = {"shape": "circle", "color": "red", "size": "medium"} | kwargs
    return ClipSpec((ObjectSpec(motion=motion, speed=speed, **fields),))


def rgb(values: tuple[int, int, int]) -> Tensor:
    return torch.tensor(values) / 127.5 - 1


def mask_of(clip: Tensor, color: str) -> Tensor:
    """Pixels `[T, H, W]` that have an object's full colour."""
    return (clip - rgb(COLOR_RGB[color]).view(3, 1, 1, 1)).abs().amax(0) < 0.15


def centroids(mask: Tensor) -> Tensor:
    """`[T, 2]`: x, y in frame heights."""
    y, x = torch.meshgrid(
        (torch.arange(mask.shape[1]) + 0.5) / mask.shape[1],
        (torch.arange(mask.shape[2]) + 0.5) / mask.shape[1],
        indexing="ij",
    )
    total = mask.sum((1, 2)).clamp(min=1)
    return torch.stack(((mask * x).sum((1, 2)) / total, (mask * y).sum((1, 2)) / total), 1)


SPECS = [sample_spec(Random(i)) for i in range(12)]


def test_values_and_shape():
    _, clips = draw(SPECS, frames=9)
    assert clips.shape == (12, 3, 9, HEIGHT, WIDTH) and clips.dtype == torch.float32
    assert clips.isfinite().all() and clips.min() >= -1 and clips.max() <= 1
    assert clips.device.type == "cpu"


def test_same_seed_same_clip_other_seed_other_clip():
    _, a = draw(SPECS, seed=3, frames=5)
    _, b = draw(SPECS, seed=3, frames=5)
    _, c = draw(SPECS, seed=4, frames=5)
    assert torch.equal(a, b)
    assert ((a - c).abs().flatten(1).amax(1) > 0.1).all()


def test_a_frame_does_not_depend_on_how_many_are_drawn():
    params = sample_params(SPECS, Random(0), HEIGHT, WIDTH)
    whole = render(params, 20, HEIGHT, WIDTH)
    torch.testing.assert_close(render(params, 7, HEIGHT, WIDTH), whole[:, :, :7])
    torch.testing.assert_close(render(params, 5, HEIGHT, WIDTH, first_frame=15), whole[:, :, 15:])


def test_a_clip_does_not_depend_on_its_batch():
    params = sample_params(SPECS, Random(0), HEIGHT, WIDTH)
    whole = render(params, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(render(params[4:6], 3, HEIGHT, WIDTH), whole[4:6])


def test_two_sizes_show_the_same_clip():
    params = sample_params(SPECS, Random(0), 64, 96)
    small = render(params, 4, 64, 96)
    large = render(params, 4, 128, 192)
    shrunk = F.avg_pool3d(large, (1, 2, 2))
    assert (small - shrunk).abs().mean() < 0.02
    shifted = torch.roll(shrunk, 2, -1)  # the bound above means something
    assert (small - shifted).abs().mean() > 0.04


@pytest.mark.parametrize("color", grammar.COLORS)
def test_colour_is_exact_in_the_middle_of_a_solid_object(color):
    params, clips = draw([one(color=color, shape="square")], frames=1)
    p = dict(zip(FIELDS, params.objects[0, 1].tolist(), strict=True))
    pixel = clips[0, :, 0, int(p["y"] * HEIGHT), int(p["x"] * HEIGHT)]
    torch.testing.assert_close(pixel, rgb(COLOR_RGB[color]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("background", grammar.BACKGROUNDS)
def test_plain_background_is_exact(background):
    spec = replace(one(size="small"), background=background)
    _, clips = draw([spec], frames=1)
    wanted = rgb(BACKGROUND_RGB[background]).view(3, 1, 1)
    share = ((clips[0, :, 0] - wanted).abs().amax(0) < 1e-5).float().mean()
    assert share > 0.85


@pytest.mark.parametrize("size", grammar.SIZES)
def test_area_follows_the_size(size):
    _, clips = draw([one(size=size)], frames=1)
    radius = math.sqrt(mask_of(clips[0], "red")[0].sum().item() / math.pi) / HEIGHT
    assert abs(radius / (0.95 * SIZE_RADIUS[size]) - 1) < 0.1


def test_textures_darken_about_half_of_an_object():
    specs = [one(texture=t, shape="square", size="large") for t in grammar.TEXTURES]
    _, clips = draw(specs, frames=1)
    bright = [mask_of(c, "red").sum().item() for c in clips]
    assert bright[0] > 0 and all(0.3 < b / bright[0] < 0.7 for b in bright[1:])


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
@pytest.mark.parametrize("speed", grammar.SPEEDS)
def test_linear_motion_goes_where_it_says(motion, axis, sign, speed):
    _, clips = draw([one(motion, speed, size="small")] * 4, frames=11)
    for clip in clips:
        place = centroids(mask_of(clip, "red"))[:9]
        moved = place[-1] - place[0]
        assert moved[axis] * sign > 0.02
        assert moved[1 - axis].abs() < 0.01


def test_speeds_differ():
    _, clips = draw([one("right", s, size="small") for s in grammar.SPEEDS], frames=9)
    slow, normal, fast = (centroids(mask_of(c, "red"))[[0, 8], 0].diff().item() for c in clips)
    assert slow * 1.8 < normal and normal * 1.8 < fast


def test_a_linear_motion_comes_back():
    _, clips = draw([one("right", "fast", size="small")], frames=81)
    seen = mask_of(clips[0], "red").sum((1, 2)) > 20
    x = centroids(mask_of(clips[0], "red"))[:, 0]
    assert (x.diff() < -0.5).any()  # from the right edge to the left one
    assert seen.float().mean() > 0.6


def test_periodic_motions():
    motions = ("still", "bounce", "sway", "circle", "spin", "pulse")
    _, clips = draw([one(m, "normal", shape="square", size="small") for m in motions], frames=81)
    extent, area = {}, {}
    for motion, clip in zip(motions, clips, strict=True):
        mask = mask_of(clip, "red")
        place = centroids(mask)
        extent[motion] = (place.amax(0) - place.amin(0)).tolist()
        count = mask.sum((1, 2)).float()
        area[motion] = (count.max() / count.min()).item()
    assert max(extent["still"]) < 0.005 and area["still"] < 1.01
    assert extent["bounce"][0] < 0.02 and extent["bounce"][1] > 0.25
    assert extent["sway"][0] > 0.45 and extent["sway"][1] < 0.02
    assert min(extent["circle"]) > 0.3
    assert max(extent["spin"]) < 0.03 and area["spin"] < 1.25
    assert max(extent["pulse"]) < 0.03 and area["pulse"] > 2.5
    spin = clips[motions.index("spin")]
    assert (spin[:, 0] - spin[:, 8]).abs().max() > 0.5  # it does turn


@pytest.mark.parametrize(("pan", "axis", "sign"), [("left", 1, 1), ("right", 1, -1), ("up", 0, 1), ("down", 0, -1)])
def test_the_background_scrolls_against_the_pan(pan, axis, sign):
    spec = replace(one(size="small"), background="gray", background_texture="dotted", pan=pan)
    _, clips = draw([spec], frames=9)
    first, later = clips[0, 0, 0], clips[0, 0, 8]
    pixels = round(0.9 * HEIGHT * 8 / 81)
    errors = {s: (torch.roll(first, s * pixels, axis) - later).abs().mean().item() for s in (-1, 0, 1)}
    assert min(errors, key=lambda s: errors[s]) == sign


def test_the_front_object_covers_the_back_one():
    front, back = ObjectSpec("square", "green", "medium"), ObjectSpec("square", "red", "large")
    params = sample_params([ClipSpec((front, back), "in front of")] * 8, Random(0), HEIGHT, WIDTH)
    both = render(params, 1, HEIGHT, WIDTH)
    alone = Params(params.objects, params.ground, params.shapes.clone())
    alone.shapes[:, 0] = -1  # the back row comes first
    whole_front = mask_of(render(alone, 1, HEIGHT, WIDTH)[:, :, 0].transpose(0, 1), "green")
    still_there = mask_of(both[:, :, 0].transpose(0, 1), "green")
    assert torch.equal(whole_front, still_there)
    covered = Params(params.objects, params.ground, params.shapes.clone())
    covered.shapes[:, 1] = -1
    red_alone = mask_of(render(covered, 1, HEIGHT, WIDTH)[:, :, 0].transpose(0, 1), "red").sum((1, 2))
    red_seen = mask_of(both[:, :, 0].transpose(0, 1), "red").sum((1, 2))
    assert (red_seen < red_alone).any() and (red_seen > 0).all()


def test_objects_in_front_of_each_other_meet_early():
    specs = [sample_spec(Random(i), True) for i in range(400)]
    specs = [s for s in specs if s.relation == "in front of"][:60]
    params = sample_params(specs, Random(0), HEIGHT, WIDTH)
    shapes = {
        "front": torch.stack((torch.full_like(params.shapes[:, 0], -1), params.shapes[:, 1]), 1),
        "back": torch.stack((params.shapes[:, 0], torch.full_like(params.shapes[:, 1], -1)), 1),
    }
    ground = torch.full_like(params.ground, -1.0)
    ground[:, 0] = 0
    masks = {k: render(Params(params.objects, ground, v), 41, 32, 48).amax(1) > -0.7 for k, v in shapes.items()}
    touching = (masks["front"] & masks["back"]).flatten(1).any(1)
    assert touching.float().mean() > 0.95


def test_dtype():
    params = sample_params(SPECS[:2], Random(0), 32, 48)
    assert render(params, 1, 32, 48, dtype=torch.bfloat16).dtype == torch.bfloat16
