"""The prompt checker: targets, loss, reading, scoring, files. The networks here are tiny and trained for seconds."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse_pipelines.clips.checker import (
    DEFAULT_PATH,
    IGNORED,
    OBJECT_ATTRIBUTES,
    OBJECT_HEADS,
    SCENE_HEADS,
    Checker,
    CheckerConfig,
    Scores,
    Share,
    TrainingSizes,
    augment,
    checker_loss,
    every_nth_frame,
    load_checker,
    queries_from_specs,
    read_attributes,
    save_checker,
    score,
    targets_from_specs,
    train_checker,
    validate_checker,
)
from vidsparse_pipelines.clips.checker.training import _mark_overlaps
from vidsparse_pipelines.clips.grammar import COLORS, ClipSpec, ObjectSpec, sample_spec
from vidsparse_pipelines.clips.renderer import render, sample_params

TINY = CheckerConfig(height=24, width=8, scene_width=8, temporal_width=32)
SMALL = (24, 36)

ALONE = ClipSpec((ObjectSpec("star", "blue", "small", "striped", "still"),), background="teal")
ORDERED = ClipSpec(
    (ObjectSpec("circle", "red", "small", "solid", "sway", "fast"), ObjectSpec("ring", "white", "large")),
    "in front of",
    "brown",
    "dotted",
    "up",
)
BESIDE = ClipSpec(
    (ObjectSpec("cross", "green", motion="bounce", speed="slow"), ObjectSpec("square", "pink", motion="still")), "and"
)


def draw(specs: list[ClipSpec], frames: int = 33, size=SMALL, seed: int = 0) -> Tensor:
    return render(sample_params(specs, Random(seed), *size), frames, *size)


@pytest.fixture(scope="module")
def overfitted() -> tuple[Checker, Tensor, list[ClipSpec]]:
    """A checker that knows six clips by heart, among them pairs in either order."""
    torch.manual_seed(0)
    swapped = ClipSpec(
        (
            ObjectSpec("square", "yellow", "medium", "checkered"),
            ObjectSpec("triangle", "blue", "large", motion="left"),
        ),
        "in front of",
        "navy",
        "gradient",
    )
    specs = [ALONE, ORDERED, BESIDE, swapped, *(sample_spec(Random(i), False) for i in (5, 6))]
    clips = draw(specs)
    checker = Checker(TINY).train()
    frames, targets = checker.prepare(clips), targets_from_specs(specs)
    clip, color = queries_from_specs(specs)
    optimizer = torch.optim.AdamW(checker.parameters(), lr=5e-3)
    losses: list[float] = []
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 120)
        scene, objects = checker(frames, clip, color)
        loss, _ = checker_loss(scene, objects, targets, clip, color)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.02 * losses[0]
    return checker.eval(), clips, specs


def test_targets():
    t = targets_from_specs([ALONE, ORDERED, BESIDE])
    assert t["present"].sum(1).tolist() == [1, 2, 2]
    blue, red, white = (COLORS.index(c) for c in ("blue", "red", "white"))
    for name in OBJECT_ATTRIBUTES:
        if name != "speed":
            assert OBJECT_HEADS[name][int(t[name][0, blue])] == getattr(ALONE.objects[0], name)
    assert t["speed"][0, blue] == IGNORED  # still
    assert t["speed"][1, red] == 2
    assert t["shape"][0, red] == IGNORED  # absent
    assert t["order"][1, red] == 0 and t["order"][1, white] == 1
    assert (t["order"][[0, 2]] == IGNORED).all()
    assert [SCENE_HEADS["pan"][i] for i in t["pan"]] == ["none", "up", "none"]
    assert (t["shape"] != IGNORED).sum() == 5


def test_loss_sees_defined_targets_only():
    specs = [ALONE, ORDERED, BESIDE]
    targets = targets_from_specs(specs)
    clip, color = queries_from_specs(specs)
    g = torch.Generator().manual_seed(0)
    scene = {k: torch.randn(3, len(v), generator=g) for k, v in SCENE_HEADS.items()}
    scene["present"] = torch.randn(3, len(COLORS), generator=g)
    objects = {k: torch.randn(len(clip), len(v), generator=g).requires_grad_() for k, v in OBJECT_HEADS.items()}
    loss, parts = checker_loss(scene, objects, targets, clip, color)
    loss.backward()
    for name, logits in objects.items():
        defined = targets[name][clip, color] != IGNORED
        assert logits.grad is not None
        assert torch.equal(logits.grad.abs().sum(1) > 0, defined)
    wanted = torch.nn.functional.cross_entropy(objects["shape"], targets["shape"][clip, color])
    torch.testing.assert_close(parts["shape"], wanted)
    targets["present_weight"] = torch.zeros_like(targets["present"])
    assert checker_loss(scene, objects, targets, clip, color)[1]["present"] == 0


def test_a_batch_without_any_order_has_a_finite_loss():
    checker = Checker(TINY)
    clip, color = queries_from_specs([ALONE])
    scene, objects = checker(checker.prepare(draw([ALONE], 9)), clip, color)
    loss, parts = checker_loss(scene, objects, targets_from_specs([ALONE]), clip, color)
    assert loss.isfinite() and parts["order"] == 0 and parts["speed"] == 0


def test_overfits_every_head(overfitted):
    checker, clips, specs = overfitted
    scores = score(checker, clips, specs)
    assert scores.all_right == Share(len(specs), len(specs))
    assert all(s.right == s.count > 0 for s in scores.attributes.values()), str(scores)
    assert scores.one_object.count + scores.two_objects.count == len(specs) and all(scores.right)


def test_reads_what_is_drawn(overfitted):
    checker, clips, specs = overfitted
    for spec, read in zip(specs, read_attributes(checker, clips), strict=True):
        assert read["count"] == len(spec.objects)
        assert {o["color"]: o["shape"] for o in read["objects"]} == {o.color: o.shape for o in spec.objects}
        assert (read["background"], read["pan"]) == (spec.background, spec.pan)
        assert read["front"] == spec.objects[0].color or spec.relation != "in front of"
        assert set(read) == {"objects", "count", "background", "background_texture", "pan", "front"}
        assert all(set(o) == {"color", *OBJECT_ATTRIBUTES} for o in read["objects"])


def other(value: str, values: tuple[str, ...]) -> str:
    return next(v for v in values if v != value)


@pytest.mark.parametrize("name", ["shape", "size", "texture", "motion", "speed", "order", *SCENE_HEADS])
def test_one_wrong_attribute_makes_a_clip_wrong(overfitted, name):
    checker, clips, specs = overfitted
    spec = specs[1]
    if name == "order":
        wrong = replace(spec, objects=spec.objects[::-1])
    elif name in SCENE_HEADS:
        wrong = replace(spec, **{name: other(getattr(spec, name), SCENE_HEADS[name])})
    else:
        o = spec.objects[0]
        wrong = replace(
            spec, objects=(replace(o, **{name: other(getattr(o, name), OBJECT_HEADS[name])}), spec.objects[1])
        )
    scores = score(checker, clips[:3], [specs[0], wrong, specs[2]])
    assert scores.right == (True, False, True)
    missed = {k: s.count - s.right for k, s in scores.attributes.items() if s.right < s.count}
    assert missed == {name: 1}
    assert scores.one_object == Share(1, 1) and scores.two_objects == Share(1, 2)


def test_an_object_that_is_not_there_has_no_right_attribute(overfitted):
    checker, clips, specs = overfitted
    absent = next(c for c in COLORS if c != "blue")
    wrong = replace(specs[0], objects=(replace(specs[0].objects[0], color=absent),))
    scores = score(checker, clips[:1], [wrong])
    assert all(scores.attributes[k] == Share(0, 1) for k in ("color", "shape", "size", "texture", "motion"))
    assert scores.attributes["speed"].count == 0
    assert scores.attributes["count"] == Share(1, 1) and scores.attributes["background"] == Share(1, 1)


def test_score_needs_a_spec_for_each_clip(overfitted):
    checker, clips, specs = overfitted
    with pytest.raises(ConfigError, match="got 1 specs for 6 clips"):
        score(checker, clips, specs[:1])


@pytest.mark.parametrize("shape", [(1, 3, 1, 24, 36), (2, 3, 7, 31, 41), (1, 3, 120, 48, 80)])
def test_any_length_and_size(shape):
    checker = Checker(TINY).eval()
    clips = torch.rand(shape) * 2 - 1
    frames = checker.prepare(clips)
    assert frames.shape[1] == (shape[2] - 1) // 4 + 1 and frames.shape[3] == TINY.height
    assert len(read_attributes(checker, clips)) == shape[0]


def test_clips_of_a_wrong_shape():
    checker = Checker(TINY)
    with pytest.raises(ConfigError, match=r"got \[3, 9, 24, 36\]"):
        checker.prepare(torch.zeros(3, 9, 24, 36))
    with pytest.raises(ConfigError, match="must be"):
        read_attributes(checker, torch.zeros(1, 4, 9, 24, 36))


def test_every_fourth_frame_alone():
    specs = [sample_spec(Random(i)) for i in range(10)]
    params = sample_params(specs, Random(0), 32, 48)
    whole = render(params, 81, 32, 48)[:, :, ::4]
    sparse = render(every_nth_frame(params, 4), 21, 32, 48)
    assert (whole - sparse).abs().mean() < 1e-4 and ((whole - sparse).abs() > 0.02).float().mean() < 1e-4


def test_orders_and_visibility_come_from_the_pixels():
    hidden = ClipSpec((ObjectSpec("square", "red", "large"), ObjectSpec("circle", "blue", "small")), "in front of")
    far = ClipSpec((ObjectSpec("square", "red", "small"), ObjectSpec("circle", "blue", "small")), "and")
    seen = ClipSpec((ObjectSpec("circle", "red", "small"), ObjectSpec("square", "blue", "large")), "in front of")
    specs = [hidden, far, seen, ALONE]
    params = sample_params(specs, Random(0), 64, 96)
    params.objects[0, :, 6:8] = torch.tensor([0.75, 0.5])
    params.objects[1, :, 6:8] = torch.tensor([[0.3, 0.5], [1.2, 0.5]])
    params.objects[2, :, 6:8] = torch.tensor([0.75, 0.5])
    targets = targets_from_specs(specs)
    targets["present_weight"] = torch.ones_like(targets["present"])
    _mark_overlaps(targets, specs, params, 4)
    red, blue = COLORS.index("red"), COLORS.index("blue")
    assert targets["shape"][0, blue] == IGNORED and targets["present_weight"][0, blue] == 0
    assert targets["shape"][0, red] != IGNORED and targets["order"][0, red] == IGNORED
    assert targets["order"][1, [red, blue]].tolist() == [2, 2]
    assert targets["order"][2, [red, blue]].tolist() == [0, 1]
    assert targets["shape"][2, blue] != IGNORED
    assert (targets["order"][3] == IGNORED).all()


def test_augmented_frames_stay_near_and_in_range():
    torch.manual_seed(0)
    frames = Checker(TINY).prepare(draw([sample_spec(Random(i)) for i in range(16)]))
    out = augment(frames)
    assert out.shape == frames.shape and out.min() >= -1 and out.max() <= 1
    change = (out - frames).abs().mean((1, 2, 3, 4))
    assert (change < 0.25).all() and (change > 0.005).float().mean() > 0.5


def test_training_runs_resumes_and_passes_whole_clips_to_corrupt(tmp_path):
    sizes = TrainingSizes(
        small=(16, 24), large=(24, 40), lengths=((9, 0.8), (5, 0.2)), batch_small=6, batch_large=4, fresh=2, pool=8
    )
    seen: list[tuple[int, ...]] = []
    lines: list[str] = []

    def corrupt(clips: Tensor) -> Tensor:
        seen.append(tuple(clips.shape))
        return clips * 0.9

    path = tmp_path / "state.pt"
    settings = {"seed": 1, "corrupt": corrupt, "checkpoint": path, "config": TINY, "sizes": sizes}
    train_checker("cpu", 1.5, log=lines.append, **settings)
    state = torch.load(path, weights_only=True)
    assert state["spent"] >= 1.5 and lines and "loss" in lines[0]
    assert (2, 3, 9, 16, 24) in seen and (1, 3, 9, 24, 40) in seen
    again = train_checker("cpu", 1.0, log=lines.append, **settings)  # nothing is left to spend
    assert all(torch.equal(v, state["checker"][k]) for k, v in again.state_dict().items())
    assert not again.training
    train_checker("cpu", state["spent"] + 0.5, log=lines.append, **settings)
    assert torch.load(path, weights_only=True)["step"] > state["step"]


def test_validation_is_of_held_out_clips_and_repeatable(overfitted):
    checker = overfitted[0]
    options = {"sizes": (SMALL, (24, 40)), "num_frames": 9}
    a, b = (validate_checker(checker, "cpu", 9, **options) for _ in range(2))
    assert a == b == checker.scores and a.all_right.count == 9
    other_seed = validate_checker(checker, "cpu", 9, seed=2, corrupt=lambda c: c, **options)
    assert checker.scores == a and other_seed.all_right.count == 9


def test_file_round_trip(overfitted, tmp_path):
    checker, clips, specs = overfitted
    path = tmp_path / "checker.safetensors"
    scores = score(checker, clips, specs)
    save_checker(checker, path, scores)
    loaded = load_checker(path)
    assert loaded.config == TINY and not loaded.training and loaded.scores is not None
    assert loaded.scores.as_dict() == scores.as_dict()
    assert next(loaded.parameters()).dtype == torch.float32
    assert score(loaded, clips, specs).all_right == scores.all_right
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelLoadError, match="no prompt checker at .*train_tiny_model"):
        load_checker(tmp_path / "none.safetensors")
    path = tmp_path / "broken.safetensors"
    save_checker(Checker(TINY), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="not a readable prompt checker"):
        load_checker(path)


def test_size_of_the_default(tmp_path):
    checker = Checker()
    assert 0.5e6 < checker.num_parameters < 2e6
    save_checker(checker, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size <= 4_000_000


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (200, 200, 0.9812, 1.0)]
)
def test_wilson_interval(right, count, low, high):
    assert Share(right, count).interval == pytest.approx((low, high), abs=1e-4)


def test_scores_as_plain_values():
    scores = Scores({"shape": Share(3, 4), "order": Share(0, 0)}, Share(1, 4), Share(1, 2), Share(0, 2), (True,) * 4)
    data = scores.as_dict()
    assert Scores.from_dict(data).as_dict() == data
    assert "right" not in data and data["all_right"] == {
        "right": 1,
        "count": 4,
        "share": 0.25,
        "wilson95": [pytest.approx(0.0456, abs=1e-4), pytest.approx(0.6994, abs=1e-4)],
    }
    assert "shape 75.0%" in str(scores) and "order none" in str(scores)


@pytest.mark.skipif(not DEFAULT_PATH.exists(), reason="this checkout has no trained checker")
def test_the_bundled_checker_reads_real_clips():
    checker = load_checker()
    assert checker.scores is not None and checker.scores.all_right.count >= 1000
    assert DEFAULT_PATH.stat().st_size <= 4_000_000
    scores = validate_checker(checker, "cpu", 12, seed=3)
    assert scores.all_right.value >= 0.75
