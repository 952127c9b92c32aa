"""The guard: what it measures, what it does about it, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidsparse
from vidsparse import LatentGrid, Recipe, TokenLayout, make_context, sparse_attention
from vidsparse.errors import ConfigError, DenseFallbackError
from vidsparse.guard import HEAD_GROUPS, ROWS, Guard, Measured, denser, is_denser, measure, sample
from vidsparse.methods import PROCESSORS, processor_class
from vidsparse.processors.context import AttentionContext
from vidsparse.schedule import GUARDED

PLAIN: dict[str, Any] = {"warmup_steps": 1, "dense_layers": 0, "min_tokens": 0}


def guarded(pipe: Any, target: float, method: str = "pooled", **options: Any) -> Any:
    return vidsparse.apply(pipe, method, guard=target, **{**PLAIN, **options})


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# What it measures


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 9), height=st.integers(1, 9), text=st.integers(0, 20), heads=st.integers(1, 41),
    layer=st.integers(0, 60), step=st.integers(0, 60),
)  # fmt: skip
def test_samples_are_spread_over_video_rows_and_all_heads(
    frames: int, height: int, text: int, heads: int, layer: int, step: int
) -> None:
    layout = TokenLayout(LatentGrid(frames, height, 7), text_before=text, text_after=3)
    context = AttentionContext(layer, 61, step, 61, None, layout)
    first, among, count, offset, _ = sample(context, heads)
    rows = [first + (i * among + offset) // count for i in range(count)]
    assert count == min(ROWS, frames * height * 7) == len(set(rows))
    assert text <= rows[0] and rows[-1] < text + frames * height * 7
    gaps = [b - a for a, b in zip(rows, rows[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    seen: set[int] = set()
    for later in range(HEAD_GROUPS):
        begin, end = sample(replace(context, step_index=step + later), heads)[4]
        assert 0 <= begin < end <= heads and end - begin <= -(-heads // HEAD_GROUPS)
        seen |= set(range(begin, end))
    assert seen == set(range(heads))
    assert sample(context, heads) == sample(context, heads)


@pytest.mark.parametrize("method", ["radial", "pooled", "pisa", "semantic", "svg1"])
def test_agreement_is_that_of_the_corrected_output(method: str) -> None:
    """Over all rows and heads it is 1 - |out - exact|^2 / |exact|^2, whatever the method does for what it drops."""
    layout = TokenLayout(LatentGrid(6, 8, 8), text_after=5)
    query, key, value = (torch.randn(2, 389, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    value = value + 1
    context = make_context(layout, Recipe.from_options(method, density=0.3), "cpu")
    out = sparse_attention(query, key, value, context)
    truth = exact(query, key, value)
    for step in range(HEAD_GROUPS):
        context = replace(context, step_index=step, layer_index=1)
        first, among, count, offset, (begin, end) = sample(context, 4)
        rows = first + (torch.arange(count) * among + offset) // count
        found = measure(query, key, value, out, context, None, None)
        assert found is not None and found.shape == (2, 32 * (end - begin), 2)
        found = found.sum(1)
        wanted, got = (x[:, rows, begin:end].double() for x in (truth, out))
        error, norm = (got - wanted).square().sum((1, 2, 3)), wanted.square().sum((1, 2, 3))
        assert torch.allclose(found.double(), torch.stack([error, norm], 1), rtol=1e-4)
        # Of the worst sample of the batch.
        assert Measured(found).agreement() == pytest.approx(float((1 - error / norm).min()), abs=1e-4)
        assert 0 < Measured(found).agreement() < 0.999


@pytest.mark.parametrize(
    ("sums", "wanted"),
    [([[0.0, 2.0]], 1.0), ([[0.5, 2.0], [0.1, 2.0]], 0.75), ([[3.0, 1.0]], 0.0), ([[float("nan"), 1.0]], 0.0),
     ([[float("inf"), 1.0]], 0.0), ([[0.0, 0.0]], 1.0), ([[1e-9, 0.0]], 0.0)],
)  # fmt: skip
def test_agreement_of_sums(sums: list[list[float]], wanted: float) -> None:
    """What is not finite agrees with nothing."""
    assert Measured(torch.tensor(sums)).agreement() == pytest.approx(wanted)


# What it does


def test_dense_and_full_density_are_never_raised(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline()
    handle = guarded(pipe, 0.999, density=1.0)
    generate(pipe)
    report = handle.report()
    assert report.least_agreement is not None and report.least_agreement > 0.9999 and report.raised == []
    assert report.num_sparse_calls == 18
    handle = guarded(pipe, 0.999, "dense")
    generate(pipe)
    assert handle.report().guard is None and handle.report().to_dict()["guard"] is None


def test_a_met_target_changes_nothing(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline()
    vidsparse.apply(pipe, "pooled", **PLAIN)
    wanted = generate(pipe)
    handle = guarded(pipe, 0.01)
    assert torch.equal(generate(pipe), wanted)
    guard = handle.report().to_dict()["guard"]
    assert guard["raised"] == [] and guard["calls"] == 18 and guard["calls_below"] == 0
    assert [[value is None for value in line] for line in guard["agreement"]] == [[True, False, False, False]] * 3


def test_layers_that_fall_short_are_raised_from_the_next_step_on(build_pipeline: Callable, generate: Callable) -> None:
    """Density 0.25, then 0.5, then dense; and both guidance branches do the same."""
    pipe = build_pipeline()
    handle = guarded(pipe, 0.9999)
    generate(pipe, num_inference_steps=5)
    report = handle.report()
    assert report.matrix()[2] == [[1.0, 0.25, 0.5, 1.0, 1.0]] * 3
    assert [(x.layer, x.step, x.action) for x in report.raised] == [
        *((layer, 2, "density 0.50") for layer in range(3)), *((layer, 3, "dense") for layer in range(3))
    ]  # fmt: skip
    assert report.dense_calls == {GUARDED: 12, "warm-up step": 6} and report.fallbacks == []
    by_place: dict[Any, set[float]] = {}
    for row in report.rows:
        by_place.setdefault((row.layer, row.step), set()).add(row.density)
        assert (row.agreement is None) == (row.reason is not None)
    assert all(len(densities) == 1 for densities in by_place.values())
    # What a layer was raised for is the worst of the step before.
    for raised in report.raised:
        before = [r.agreement for r in report.rows if r.layer == raised.layer and r.step == raised.step - 1]
        assert raised.agreement == min(before) < 0.9999
    assert json.loads(json.dumps(report.to_dict()))["guard"]["calls"] == 12
    assert "guard 0.9999: agreement at least" in report.summary() and "3 layers raised" in report.summary()


def test_it_is_the_same_every_time_and_forgotten_by_the_next_video(
    build_pipeline: Callable, generate: Callable
) -> None:
    pipe = build_pipeline()
    handle = guarded(pipe, 0.93)
    first = generate(pipe, num_inference_steps=5)
    wanted = handle.report().to_dict()
    assert 0 < len({x["layer"] for x in wanted["guard"]["raised"]}) < 3
    for _ in range(2):
        assert torch.equal(generate(pipe, num_inference_steps=5), first)
        assert handle.report().to_dict() == wanted


def test_only_the_layer_that_falls_short(build_pipeline: Callable, generate: Callable) -> None:
    """A layer whose attention is spread thin against one that looks at few tokens."""
    pipe = build_pipeline()
    with torch.no_grad():
        for index, block in enumerate(pipe.transformer.blocks):
            # The norm over query and key undoes other scales.
            block.attn1.norm_q.weight.fill_(8.0 if index == 1 else 0.01)
    handle = guarded(pipe, 0.9)
    generate(pipe, num_inference_steps=5)
    guard = handle.report().guard_dict()
    assert {x["layer"] for x in guard["raised"]} == {x for x, line in enumerate(guard["agreement"]) if min(
        value for value in line if value is not None) < 0.9}  # fmt: skip
    assert len({x["layer"] for x in guard["raised"]}) in (1, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_and_branches_in_one(batch: int, build_transformer: Callable, forward: Callable) -> None:
    """The worst sample decides, and a batch costs no more rows in the report."""
    model = build_transformer()
    processor = vidsparse.PooledProcessor(guard=0.9999, **PLAIN)
    model.set_attn_processor(processor)
    with torch.no_grad():
        for timestep in (900.0, 600.0, 300.0):
            forward(model, batch=batch, timestep=timestep)
    report = processor.report()
    assert report.matrix()[2] == [[1.0, 0.25, 0.5]] * 3
    assert all(row.calls == 1 for row in report.rows)


def test_a_changed_layer_drops_what_it_kept(build_pipeline: Callable, generate: Callable) -> None:
    """A selection that serves three steps does not outlive the density it was made for."""
    pipe = build_pipeline()
    handle = guarded(pipe, 0.9999, refresh_every=3, keep="state")
    generate(pipe, num_inference_steps=6)
    density = handle.report().matrix()[2]
    # The step of a selection is exact (density 1); the next falls short, and the one after selects anew.
    assert density == [[1.0, 1.0, 0.25, 1.0, 0.5, 1.0]] * 3
    assert [x.action for x in handle.report().raised] == ["density 0.50"] * 3 + ["dense"] * 3


def test_strict_lets_the_guard_go_dense(build_pipeline: Callable, generate: Callable) -> None:
    """Who asks for a guard asks for what it does; everything else still raises."""
    pipe = build_pipeline()
    handle = guarded(pipe, 0.9999, density=0.5, strict=True)
    generate(pipe)
    assert handle.report().dense_calls[GUARDED] == 12
    vidsparse.apply(pipe, "pooled", guard=0.9, strict=True, warmup_steps=0, min_tokens=10_000)
    with pytest.raises(DenseFallbackError, match="min_tokens"):
        generate(pipe)


def test_two_experts_have_layers_of_their_own(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline(experts=2)
    handle = guarded(pipe, 0.9999, density=0.5, warmup_steps=0)
    generate(pipe, num_inference_steps=6)
    names = {x.name for x in handle.report().raised}
    assert names and {name.split(".")[0] for name in names} <= {"transformer", "transformer_2"}
    for raised in handle.report().raised:
        rows = [r for r in handle.report().rows if r.name == raised.name and (r.step or 0) >= (raised.step or 0)]
        assert rows and all(row.reason == GUARDED for row in rows)


def test_training_is_not_guarded(build_transformer: Callable, forward: Callable) -> None:
    model = build_transformer().train()
    processor = vidsparse.PooledProcessor(guard=0.9999, **{**PLAIN, "warmup_steps": 0})
    model.set_attn_processor(processor)
    forward(model).sum().backward()
    assert processor.report().guard is None and processor.report().raised == []
    model.eval()
    forward(model)
    assert "the guard does not run where gradients are recorded" in processor.report().notes


def test_compiled(build_pipeline: Callable, generate: Callable) -> None:
    """`torch.compile` without breaks: each call of the guard is an opaque operator in the graph."""
    pipe = build_pipeline(num_layers=1)
    handle = guarded(pipe, 0.9999, "radial", decay_factor=0.3, block_size=16)
    generate(pipe)
    wanted = handle.report().guard_dict()
    assert wanted["raised"]
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    generate(pipe)
    assert handle.report().guard_dict()["raised"] == wanted["raised"]
    assert handle.report().guard_dict()["agreement"] == wanted["agreement"]


def test_a_wrong_output_is_noticed(
    build_pipeline: Callable, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall would not see it: all blocks are computed, but the result is wrong."""
    from vidsparse.processors import delegate

    attend = delegate.attend
    monkeypatch.setattr(delegate, "attend", lambda *args, **options: (1.5 * (r := attend(*args, **options))[0], r[1]))
    pipe = build_pipeline()
    handle = guarded(pipe, 0.9, density=1.0)
    generate(pipe)
    assert handle.report().least_agreement == pytest.approx(0.75, abs=1e-3)
    assert {x.action for x in handle.report().raised} == {"dense"}


# Its parts


@pytest.mark.parametrize("method", sorted(set(PROCESSORS) - {"dense", "tuned"}))
def test_every_method_can_be_raised_or_goes_dense(method: str) -> None:
    processor = processor_class(method)(guard=0.9)
    layout = processor.layout(LatentGrid(9, 16, 16))
    parts, _ = processor.parts(layout, "cpu")
    first = denser(processor, parts, 1)
    if first is None:
        now = parts.block_mask.density if parts.block_mask is not None else parts.density
        assert now is not None and now > 0.3
        return
    assert type(first) is type(processor) and first.recipe.schedule == processor.recipe.schedule
    raised, _ = first.parts(layout, "cpu")
    if is_denser(raised, parts, 1) and parts.density is not None:
        assert raised.density == pytest.approx(2 * parts.density, rel=0.3)
    assert denser(processor, parts, 3) is None


def test_a_share_of_the_mass_is_raised_too() -> None:
    processor = vidsparse.SemanticProcessor(top_p=0.8)
    parts, _ = processor.parts(processor.layout(LatentGrid(9, 16, 16)), "cpu")
    raised = [denser(processor, parts, level) for level in (1, 2, 3)]
    assert [r and r.config.top_p for r in raised] == [pytest.approx(0.95), pytest.approx(0.9875), None]


def test_decisions_are_made_once_a_step() -> None:
    guard, low, high = Guard(), torch.tensor([[[0.2, 0.5], [0.3, 0.5]]]), torch.tensor([[[0.01, 1.0]]])
    assert guard.decide(3, 0.9) == {}
    guard.collect([("a", [high, low]), ("b", [high]), ("c", [])], None)
    assert guard.decide(3, 0.9) == {}, "the second branch of a step attends as the first did"
    assert guard.decide(4, 0.9) == {"a": 0.5}
    assert (guard.level("a"), guard.level("b")) == (1, 0)
    assert guard.decide(5, 0.9) == {}
    guard.reset()
    assert guard.level("a") == 0


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, "0.9", True, float("nan")])
def test_bad_targets(value: Any) -> None:
    with pytest.raises(ConfigError, match="`guard` must be above 0 and below 1"):
        Recipe.from_options("radial", guard=value)


def test_it_is_part_of_the_recipe() -> None:
    recipe = Recipe.from_options("radial", guard=0.9)
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.schedule.guard == 0.9


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    """A guarded call waits for nothing; and the device finds what the CPU finds."""
    layout = TokenLayout(LatentGrid(9, 16, 16))
    query, key, value = (torch.randn(2, 2304, 8, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for method in ("radial", "pooled"):
        found = []
        for device in ("cpu", "cuda"):
            context = replace(make_context(layout, Recipe.from_options(method), device), step_index=2, layer_index=1)
            q, k, v = (x.to(device) for x in (query, key, value))
            sparse_attention(q, k, v, context)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                sums = measure(q, k, v, sparse_attention(q, k, v, context), context, None, None)
                assert sums is not None
                guard = Guard()
                measured = guard.collect([("a", [sums])], None)["a"]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(measured.agreement())
        assert found[0] == pytest.approx(found[1], abs=0.01)


@pytest.mark.gpu
def test_a_generation_on_a_gpu(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline().to("cuda")
    handle = guarded(pipe, 0.9999)
    first = generate(pipe, num_inference_steps=5)
    wanted = handle.report().to_dict()
    assert handle.report().matrix()[2] == [[1.0, 0.25, 0.5, 1.0, 1.0]] * 3
    assert torch.equal(generate(pipe, num_inference_steps=5), first)
    assert handle.report().to_dict() == wanted
