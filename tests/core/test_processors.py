"""RadialProcessor on tiny random pipelines of the real Wan classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import hooks as diffusers_hooks
from diffusers.models.attention import AttentionMixin

import vidsparse
from vidsparse.errors import (
    ConfigError,
    DenseFallbackError,
    UnboundProcessorError,
    UnsupportedModelError,
)
from vidsparse.layout import LatentGrid
from vidsparse.masks.radial import radial_dense_blocks
from vidsparse.processors.binding import unbind

OPTIONS = {"block_size": 16, "decay_factor": 0.2, "variant": "paper", "dense_layers": 0, "warmup_steps": 0}

STEPS_ARE_TOLD = hasattr(diffusers_hooks, "CacheContext")
"""Whether this diffusers tells the model step and number of steps; older ones leave them to be counted."""


class MaskedWanProcessor:
    """Wan self-attention written out on its own, with a token mask; what the sparse path must equal."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        assert rotary_emb is not None
        cos, sin = rotary_emb

        def rotate(x):
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
            turn = torch.complex(cos[..., ::2].double(), sin[..., ::2].double())
            return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        out = torch.softmax(scores.masked_fill(~self.mask, -torch.inf), -1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def token_mask(grid: LatentGrid, **options) -> torch.Tensor:
    dense = torch.from_numpy(radial_dense_blocks(grid, q_block_size=16, kv_block_size=16, **options))
    tokens = dense.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return tokens[: grid.num_tokens, : grid.num_tokens]


def reference(model, forward, grid, dense_layers=0, **inputs):
    """Forward with the written-out processor on the sparse layers."""
    saved = {}
    for index, block in enumerate(model.blocks):
        if index >= dense_layers:
            saved[index] = block.attn1.processor
            block.attn1.set_processor(MaskedWanProcessor(token_mask(grid, decay_factor=0.2)))
    out = forward(model, **inputs)
    for index, processor in saved.items():
        model.blocks[index].attn1.set_processor(processor)
    return out


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_full_density_equals_the_stock_output(build_pipeline, generate, variant):
    pipe = build_pipeline()
    stock = generate(pipe)
    handle = vidsparse.apply(pipe, "radial", **{**OPTIONS, "density": 1.0, "variant": variant, "sink_frames": 5})
    torch.testing.assert_close(generate(pipe), stock, atol=1e-5, rtol=1e-4)
    report = handle.report()
    assert report.num_sparse_calls == report.num_calls == 3 * 4 * 2
    assert report.sparse_density == 1.0


@torch.no_grad()
@pytest.mark.parametrize(
    ("frames", "height", "width", "batch"), [(5, 16, 16, 1), (7, 18, 22, 2), (3, 10, 6, 1)], ids=str
)
def test_sparse_equals_masked_dense(build_transformer, frames, height, width, batch):
    model = build_transformer()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    text = torch.randn(batch, 6, 32, generator=generator)

    def forward(model):
        return model(latents, torch.full((batch,), 500.0), text, return_dict=False)[0]

    grid = LatentGrid(frames, height // 2, width // 2)
    dense, want = forward(model), reference(model, forward, grid, dense_layers=1)
    handle = vidsparse.apply(model, "radial", **{**OPTIONS, "dense_layers": 1})
    got = forward(model)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    if frames > 3:
        assert (got - dense).abs().max() > 1e-2, "the mask must matter for this test to mean anything"
    assert {row.tokens for row in handle.report().rows} == {grid.num_tokens}
    assert handle.report().sparse_density == pytest.approx(
        float(radial_dense_blocks(grid, q_block_size=16, kv_block_size=16, decay_factor=0.2).mean())
    )


def test_bare_set_attn_processor_does_the_same(build_pipeline, generate):
    pipe = build_pipeline()
    stock = generate(pipe)
    handle = vidsparse.apply(pipe, "radial", block_size=16, warmup_steps=1)
    applied = generate(pipe)
    handle.remove()
    processor = vidsparse.RadialProcessor(block_size=16, warmup_steps=1)
    pipe.transformer.set_attn_processor(processor)
    assert torch.equal(generate(pipe), applied)
    assert not torch.equal(applied, stock)
    assert [r.calls for r in processor.report().rows] == [r.calls for r in handle.report().rows]


def test_report_has_the_right_layers_steps_branches_and_reasons(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, "radial", block_size=16)
    generate(pipe)
    rows = {(r.layer, r.step, r.branch): r for r in handle.report().rows}
    assert set(rows) == {(x, s, b) for x in range(3) for s in range(4) for b in ("cond", "uncond")}
    for (layer, step, _), row in rows.items():
        reason = "warm-up step" if step == 0 else "dense layer" if layer == 0 else None
        assert (row.reason, row.calls, row.tokens) == (reason, 1, 5 * 8 * 8)
        assert row.name == f"blocks.{layer}.attn1"
        assert row.density == 1.0 if reason else row.density < 1.0
        assert row.backend == ("dense" if reason else "sdpa")
    assert handle.report().fallbacks == []


def test_a_plan_says_what_the_report_will_find(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, "radial", block_size=16, cooldown_steps=1)
    plan = handle.describe(LatentGrid(5, 8, 8), 4)
    generate(pipe)
    assert handle.report().matrix()[2] == [list(row) for row in plan.density]
    assert (plan.dense_steps, plan.dense_layers, plan.block_size) == ((0, 3), (0,), 16)
    assert [handle.is_dense_step(i, 4) for i in range(4)] == [True, False, False, True]
    assert plan.mean_density == pytest.approx(handle.report().mean_density)
    assert plan.to_dict()["method"] == "radial"


def test_remove_is_bit_identical_and_leaves_nothing(build_pipeline, generate):
    pipe = build_pipeline()
    before, attributes = generate(pipe), set(vars(pipe.transformer))
    processors = dict(pipe.transformer.attn_processors)
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    handle = vidsparse.apply(pipe, block_size=16)
    assert not torch.equal(generate(pipe), before)
    assert set(pipe.transformer.state_dict()) == set(state)
    handle.remove()
    handle.remove()
    assert torch.equal(generate(pipe), before)
    after = pipe.transformer.attn_processors
    assert all(after[name] is processors[name] for name in processors)
    assert set(vars(pipe.transformer)) - attributes <= {"_diffusers_hook"}
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks
    assert handle.report().num_calls == 24


def test_a_later_processor_replaces_and_survives_remove(build_pipeline, generate):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipe = build_pipeline()
    stock = generate(pipe)
    first = vidsparse.apply(pipe, block_size=16)
    second = vidsparse.apply(pipe, "dense")
    first.remove()
    assert torch.equal(generate(pipe), stock)
    assert second.report().dense_calls == {"method dense": 24} and second.report().fallbacks == []
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    second.remove()
    assert torch.equal(generate(pipe), stock)
    assert second.report().num_calls == 24


def test_cross_attention_keeps_its_processor(build_pipeline):
    pipe = build_pipeline()
    before = {n: p for n, p in pipe.transformer.attn_processors.items() if "attn2" in n}
    vidsparse.apply(pipe)
    after = pipe.transformer.attn_processors
    assert len(before) == 3 and all(after[name] is processor for name, processor in before.items())
    assert all("Sparse" in type(after[f"blocks.{i}.attn1.processor"]).__name__ for i in range(3))


def test_a_new_generation_starts_afresh(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, block_size=16)
    first = generate(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 2:
            raise InterruptedError
        return kwargs

    with pytest.raises(InterruptedError):
        generate(pipe, callback_on_step_end=stop)
    assert handle.report().num_calls == 3 * 2 * 3
    assert torch.equal(generate(pipe), first)
    assert handle.report().num_calls == 24
    if STEPS_ARE_TOLD:
        generate(pipe, num_inference_steps=1)
        generate(pipe, num_inference_steps=1)
        assert handle.report().num_calls == 6
    handle.reset()
    assert handle.report().num_calls == 0


def test_two_pipelines_do_not_meet(build_pipeline, generate):
    one, two = build_pipeline(), build_pipeline()
    stock = generate(two)
    first, second = vidsparse.apply(one, block_size=16), vidsparse.apply(two, block_size=32, density=0.9)
    alone_one, alone_two = generate(one), generate(two)
    step = {"seen": 0}

    def interleave(pipe, index, timestep, kwargs):
        if index == 1 and not step["seen"]:
            step["seen"] = 1
            assert torch.equal(generate(two), alone_two)
        return kwargs

    assert torch.equal(generate(one, callback_on_step_end=interleave), alone_one)
    assert first.report().num_calls == second.report().num_calls == 24
    first.remove()
    assert torch.equal(generate(two), alone_two)
    second.remove()
    assert torch.equal(generate(two), stock)


def test_two_experts_share_one_run(build_pipeline, generate):
    pipe = build_pipeline(experts=2)
    stock = generate(pipe, num_inference_steps=8)
    handle = vidsparse.apply(pipe, block_size=16)
    sparse = generate(pipe, num_inference_steps=8)
    assert not torch.equal(sparse, stock)
    rows = handle.report().rows
    steps = {}
    for row in rows:
        steps.setdefault(row.name.split(".")[0], set()).add(row.step)
    assert set(steps) == {"transformer", "transformer_2"}
    assert steps["transformer"] | steps["transformer_2"] == set(range(8))
    assert not steps["transformer"] & steps["transformer_2"] and all(steps.values())
    assert all((row.reason == "warm-up step") == (row.step in (0, 1)) for row in rows)
    handle.remove()
    if not STEPS_ARE_TOLD:
        return
    processor = vidsparse.RadialProcessor(block_size=16)
    pipe.transformer.set_attn_processor(processor)
    pipe.transformer_2.set_attn_processor(processor)
    assert torch.equal(generate(pipe, num_inference_steps=8), sparse)
    assert processor.report().num_calls == handle.report().num_calls == 48


@torch.no_grad()
def test_image_to_video_leaves_image_tokens_alone(build_transformer):
    model = build_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24, text_dim=32, cross_attn_norm=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 36, 5, 16, 16, generator=generator)
    text = torch.randn(1, 512, 32, generator=generator)
    image = torch.randn(1, 3, 8, generator=generator)

    def forward(model):
        return model(latents, torch.tensor([500.0]), text, image, return_dict=False)[0]

    stock, want = forward(model), reference(model, forward, LatentGrid(5, 8, 8))
    handle = vidsparse.apply(model, **OPTIONS)
    torch.testing.assert_close(forward(model), want, atol=2e-5, rtol=1e-4)
    assert (want - stock).abs().max() > 1e-2
    handle.remove()
    assert torch.equal(forward(model), stock)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("WanVACETransformer3DModel", {"num_layers": 2, "vace_layers": [0, 1], "vace_in_channels": 20}),
        ("SkyReelsV2Transformer3DModel", {"num_layers": 3}),
    ],
)
def test_relatives_of_wan(build_transformer, forward, cls, config):
    extra = {}
    if cls == "WanVACETransformer3DModel":
        control = torch.randn(1, 20, 5, 16, 16, generator=torch.Generator().manual_seed(3))
        extra = {"control_hidden_states": control}
    model = build_transformer(cls=cls, **config)
    for block in getattr(model, "vace_blocks", []):
        torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    stock = forward(model, **extra)
    handle = vidsparse.apply(model, **{**OPTIONS, "density": 1.0})
    torch.testing.assert_close(forward(model, **extra), stock, atol=1e-5, rtol=1e-4)
    handle = vidsparse.apply(model, **OPTIONS)
    assert (forward(model, **extra) - stock).abs().max() > 1e-3
    calls = 4 if cls.startswith("WanVACE") else 3
    assert (handle.report().num_sparse_calls, handle.report().num_calls) == (calls, calls)
    handle.remove()
    assert torch.equal(forward(model, **extra), stock)


@torch.no_grad()
def test_an_attention_mask_runs_dense_and_is_reported(build_transformer, forward):
    model = build_transformer(cls="SkyReelsV2Transformer3DModel")
    model._set_ar_attention(2)
    stock = forward(model, frames=4)
    handle = vidsparse.apply(model, **OPTIONS)
    assert torch.equal(forward(model, frames=4), stock)
    assert handle.report().dense_calls == {"attention mask that is not one per key": 3} and handle.report().fallbacks
    vidsparse.apply(model, strict=True, **OPTIONS)
    with pytest.raises(DenseFallbackError, match="attention mask"):
        forward(model, frames=4)


def test_gradients_with_and_without_checkpointing(build_transformer, forward):
    model = build_transformer().train()
    vidsparse.apply(model, **OPTIONS)

    def gradients(frames_list=(5,)):
        model.zero_grad()
        torch.stack([forward(model, frames=frames).square().mean() for frames in frames_list]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, mixed = gradients(), gradients((5, 7))
    model.enable_gradient_checkpointing()
    for want, got in ((plain, gradients()), (mixed, gradients((5, 7)))):
        assert set(got) == set(want) and len(got) > 50
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-7, rtol=1e-5, msg=name)
    assert max(g.abs().max() for n, g in plain.items() if "attn1.to_q" in n) > 1e-6


@pytest.mark.parametrize("between", ["teacher", "shorter-dense"])
def test_checkpointing_replays_what_its_own_forward_did(build_transformer, forward, between):
    model = build_transformer().train()
    vidsparse.apply(model, **OPTIONS, min_tokens=200)

    def gradients():
        model.zero_grad()
        loss = forward(model).square().mean()
        if between == "teacher":
            # Counted as a step of a generation, so it may be dense where training is sparse.
            with torch.no_grad():
                forward(model)
        else:
            loss = loss + forward(model, frames=3).square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    model.enable_gradient_checkpointing()
    got = gradients()
    assert set(got) == set(want) and len(got) > 50
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-7, rtol=1e-5, msg=name)


def test_gradients_that_enter_through_the_text_only(build_transformer, forward):
    model = build_transformer().requires_grad_(False)
    handle = vidsparse.apply(model, **OPTIONS)
    latents = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model(latents, torch.tensor([500.0]), text, return_dict=False)[0].square().mean().backward()
    assert text.grad is not None and text.grad.abs().max() > 0
    assert handle.report().backends == {"reference": 3}


def test_training_under_autocast(build_transformer, forward):
    model = build_transformer().train()
    handle = vidsparse.apply(model, **{**OPTIONS, "density": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        got = forward(model)
        got.float().square().mean().backward()
        handle.remove()
        want = forward(model)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_generation_between_training_steps_has_its_own_report(build_pipeline, generate, forward):
    pipe = build_pipeline()
    model, handle = pipe.transformer, vidsparse.apply(pipe, block_size=16)
    for _ in range(2):
        model.train()
        for _ in range(2):
            forward(model).mean().backward()
        assert {(r.step, r.calls) for r in handle.report().rows} == {(None, 2)}
        model.eval()
        generate(pipe)
        assert {(r.step, r.calls) for r in handle.report().rows} == {(step, 1) for step in range(4)}


def test_training_has_no_warm_up(build_transformer, forward):
    model = build_transformer().train()
    handle = vidsparse.apply(model, block_size=16, decay_factor=0.2)
    forward(model)
    assert [(r.step, r.reason) for r in handle.report().rows] == [(None, "dense layer"), (None, None), (None, None)]
    assert {r.backend for r in handle.report().rows} == {"dense", "reference"}


@pytest.mark.parametrize("whole", [False, True], ids=["repeated-blocks-fullgraph", "whole-model"])
def test_compile_makes_two_graphs_whatever_the_layers_and_steps(build_pipeline, generate, whole):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    # More layers than dynamo's limit of 8 recompilations, where blocks are compiled one by one.
    pipe = build_pipeline(num_layers=4 if whole else 10)
    handle = vidsparse.apply(pipe, block_size=16)
    want, rows = generate(pipe), [(r.name, r.step, r.reason, r.calls) for r in handle.report().rows]
    counter = CompileCounterWithBackend("eager")
    if whole:
        pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    else:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(generate(pipe), want, atol=1e-6, rtol=1e-5)
    assert [(r.name, r.step, r.reason, r.calls) for r in handle.report().rows] == rows
    assert counter.frame_count == 2
    generate(pipe, num_inference_steps=6)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_without_cache_context_steps_follow_the_timestep(build_transformer, forward):
    model = build_transformer()
    handle = vidsparse.apply(model, block_size=16, warmup_steps=1)
    seen = {}
    with torch.no_grad():
        for timestep in (900.0, 900.0, 600.0, 600.0, 950.0):
            forward(model, timestep=timestep)
            if timestep == 600.0:
                seen = {(r.step, r.branch): r.reason for r in handle.report().rows if r.layer == 1}
    assert seen == {
        (0, "call 0"): "warm-up step",
        (0, "call 1"): "warm-up step",
        (1, "call 0"): None,
        (1, "call 1"): None,
    }
    assert {r.step for r in handle.report().rows} == {0}, "a rising timestep starts a new generation"


def test_strict(build_pipeline, build_transformer, generate, forward):
    pipe = build_pipeline()
    vidsparse.apply(pipe, strict=True, block_size=16)
    generate(pipe)
    vidsparse.apply(pipe, strict=True, block_size=16, min_tokens=10_000)
    with pytest.raises(
        DenseFallbackError, match="blocks.1.attn1 would run dense at step 1 .sequence below min_tokens"
    ):
        generate(pipe)
    model = build_transformer()
    vidsparse.apply(model, strict=True, block_size=16)
    with torch.no_grad(), pytest.raises(DenseFallbackError, match="number of steps unknown"):
        forward(model)


def test_a_plan_of_nothing_is_refused(build_transformer):
    handle = vidsparse.apply(build_transformer(), block_size=16)
    with pytest.raises(ConfigError, match="`num_steps` of a plan must be at least 1, got 0"):
        handle.describe(LatentGrid(5, 8, 8), 0)


def test_density_that_cannot_be_reached_is_noted(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, density=0.05, block_size=16)
    generate(pipe)
    (note,) = handle.report().notes
    assert note.startswith("density 0.05 asked for, 0.") and note.endswith("nearest on grid 5x8x8")
    assert handle.describe(LatentGrid(5, 8, 8), 4).note == note


def test_attention_backend_and_fused_projections(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    torch.testing.assert_close(generate(pipe), want, atol=1e-4, rtol=1e-3)
    handle.remove()
    processors = pipe.transformer.attn_processors.values()
    assert {getattr(p._attention_backend, "value", p._attention_backend) for p in processors} == {"_native_math"}
    pipe.transformer.reset_attention_backend()
    pipe.transformer.set_attention_backend("native")
    pipe.transformer.fuse_qkv_projections()
    vidsparse.apply(pipe, block_size=16)
    torch.testing.assert_close(generate(pipe), want, atol=1e-4, rtol=1e-3)


def test_lora_stays_in_effect(build_pipeline, generate):
    from peft import LoraConfig

    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, **OPTIONS)
    plain = generate(pipe)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=r"blocks\.\d+\.attn1\.(to_q|to_v)", init_lora_weights=False)
    )
    first = generate(pipe)
    assert (first - plain).abs().max() > 1e-3
    assert handle.report().num_sparse_calls == 24
    handle.remove()
    vidsparse.apply(pipe, **OPTIONS)
    assert torch.equal(generate(pipe), first)


def test_accelerate_offload_hooks_survive_remove(build_pipeline, generate):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counter.calls += 1
            return args, kwargs

    pipe = build_pipeline()
    want_dense = generate(pipe)
    handle = vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    add_hook_to_module(pipe.transformer, Counter())
    assert torch.equal(generate(pipe), want) and Counter.calls == 8
    handle.remove()
    assert torch.equal(generate(pipe), want_dense) and Counter.calls == 16


@torch.no_grad()
@pytest.mark.parametrize("bind_first", [True, False])
def test_sequential_offload(build_transformer, forward, bind_first):
    from accelerate import cpu_offload

    model = build_transformer()
    handle = vidsparse.apply(model, **OPTIONS)
    want = forward(model)
    if not bind_first:
        handle.remove()
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not bind_first:
        handle = vidsparse.apply(model, **OPTIONS)
    assert model.blocks[0].attn1.to_q.weight.device.type == "meta"
    assert torch.equal(forward(model), want)
    assert handle.report().num_sparse_calls == 3 * (1 + bind_first)


@pytest.mark.skipif(not STEPS_ARE_TOLD, reason="group offload of this diffusers needs an accelerator")
def test_group_offload(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    assert torch.equal(generate(pipe), want)
    assert handle.report().num_calls == 24


def test_copies_and_pickles_stand_alone(build_transformer, forward):
    model = build_transformer()
    stock = forward(model).detach()
    vidsparse.apply(model, **OPTIONS)
    want = forward(model).detach()
    twin = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(forward(twin).detach(), want) and torch.equal(forward(thawed).detach(), want)
    for copied in (twin, thawed):
        unbind(copied)
        assert torch.equal(forward(copied).detach(), stock) and not copied._forward_pre_hooks
    assert twin.blocks[0].attn1.processor is not model.blocks[0].attn1.processor
    processor = pickle.loads(pickle.dumps(vidsparse.RadialProcessor(density=0.5)))
    assert processor.recipe == vidsparse.RadialProcessor(density=0.5).recipe
    assert not torch.equal(stock, want)


def test_the_transformer_of_a_pipeline_can_be_pickled(build_pipeline, generate):
    pipe = build_pipeline()
    vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(generate(pipe), want)


def test_training_after_a_generation_in_inference_mode(build_pipeline, generate, forward):
    torch._dynamo.reset()
    pipe = build_pipeline()
    vidsparse.apply(pipe, **OPTIONS)
    with torch.inference_mode():
        generate(pipe)
    pipe.transformer.train().compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    forward(pipe.transformer).square().mean().backward()
    assert pipe.transformer.blocks[1].attn1.to_q.weight.grad.abs().max() > 0
    torch._dynamo.reset()


def test_a_forward_without_latents_gets_the_models_own_error(build_transformer):
    model = build_transformer()
    vidsparse.apply(model, **OPTIONS)
    with pytest.raises(TypeError, match="hidden_states"):
        model(timestep=torch.tensor([1.0]), encoder_hidden_states=torch.randn(1, 2, 32))


def test_processors_that_were_read_can_be_set_again(build_pipeline, generate):
    pipe = build_pipeline()
    stock = generate(pipe)
    handle = vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    pipe.transformer.set_attn_processor(pipe.transformer.attn_processors)
    assert torch.equal(generate(pipe), want) and handle.report().num_sparse_calls == 12
    handle.remove()
    assert torch.equal(generate(pipe), stock)


def test_a_refused_apply_leaves_the_earlier_one_working(build_pipeline, generate):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Other:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    pipe = build_pipeline(experts=2)
    handle = vidsparse.apply(pipe, block_size=16)
    want = generate(pipe)
    taken = pipe.transformer_2.blocks[1].attn1.processor
    pipe.transformer_2.blocks[1].attn1.set_processor(Other())
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="Other makes no attention call"):
            vidsparse.apply(pipe, block_size=32)
    pipe.transformer_2.blocks[1].attn1.set_processor(taken)
    assert torch.equal(generate(pipe), want)
    handle.remove()
    assert {type(p) for p in pipe.transformer_2.attn_processors.values()} == {WanAttnProcessor}


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"is_causal": True}, "causal attention asked for"), ({"dropout_p": 1e-9}, "attention dropout asked for")],
    ids=["causal", "dropout"],
)
def test_what_sparse_attention_cannot_do_runs_dense_and_is_reported(build_transformer, forward, changes, reason):
    model = build_transformer()
    handle = vidsparse.apply(model, **OPTIONS)
    layer = model.blocks[1].attn1.processor
    plain = layer.attend
    layer.attend = lambda *args, **kwargs: plain(*args, **{**kwargs, **changes})
    forward(model)
    assert handle.report().dense_calls == {reason: 1} and len(handle.report().fallbacks) == 1
    layer.strict = True
    with pytest.raises(DenseFallbackError, match=rf"blocks.1.attn1 would run dense \({reason}\)"):
        forward(model)


def test_save_and_load_while_bound(build_pipeline, generate, tmp_path):
    pipe = build_pipeline()
    stock = generate(pipe)
    vidsparse.apply(pipe, block_size=16)
    sparse = generate(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path)
    assert torch.equal(generate(pipe), stock)
    vidsparse.apply(pipe, block_size=16)
    assert torch.equal(generate(pipe), sparse)


def test_errors_say_what_to_do(build_transformer, forward):
    model = build_transformer()
    with pytest.raises(ConfigError, match="one of radial, "):
        vidsparse.apply(model, "magic")
    with pytest.raises(ConfigError, match="recipe or options, not both"):
        vidsparse.apply(model, vidsparse.Recipe.from_options("radial"), density=0.5)
    with pytest.raises(UnsupportedModelError, match="Linear is not supported; .*WanTransformer3DModel"):
        vidsparse.apply(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="one of radial, .* got"):
        vidsparse.apply(model, cast(Any, ["radial"]))
    with pytest.raises(ConfigError, match="`recipe` must be a Recipe, got 0.3; give settings by name"):
        vidsparse.RadialProcessor(cast(Any, 0.3))
    q = torch.zeros(1, 16, 1, 8)
    with pytest.raises(ConfigError, match="`context` must be an AttentionContext or a BlockMask.* got NoneType"):
        vidsparse.sparse_attention(q, q, q, cast(Any, None))
    with pytest.raises(UnsupportedModelError, match="has no transformer"):
        vidsparse.apply(object())
    model.blocks[0].attn1.set_processor(vidsparse.RadialProcessor())
    with pytest.raises(UnboundProcessorError, match="set it with `transformer.set_attn_processor"):
        forward(model)


def test_a_layer_processor_moved_to_another_model_is_refused(build_transformer, forward):
    one, two = build_transformer(), build_transformer()
    vidsparse.apply(one, **OPTIONS)
    stolen = one.blocks[0].attn1.processor
    two.blocks[0].attn1.set_processor(stolen)
    with pytest.raises(UnboundProcessorError, match="outside its model's forward"):
        forward(two)
    with pytest.raises(UnsupportedModelError, match="layer processor of another binding"):
        vidsparse.apply(two)


def test_unsupported_family_lists_the_supported():
    class SomeTransformer(torch.nn.Module, AttentionMixin):
        pass

    with pytest.raises(UnsupportedModelError, match="SomeTransformer is not supported; .*WanTransformer3DModel"):
        SomeTransformer().set_attn_processor(cast(Any, vidsparse.RadialProcessor()))


def test_scaled_dot_product_attention_is_not_patched():
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention
    vidsparse.RadialProcessor()
    from diffusers.models.transformers import transformer_wan

    assert vars(transformer_wan)["dispatch_attention_fn"].__module__ == "diffusers.models.attention_dispatch"
