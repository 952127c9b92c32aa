"""What users stack on a bound model: pipelines, compile, offload, casting, LoRA, caches, quantised weights, guiders.

The first line of each docstring names the column of the table of families that the test stands for.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import vidsparse
from vidsparse.errors import DenseFallbackError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.processors.binding import unbind
from vidsparse.testing import CASES, model_class, prefix_mask
from vidsparse_kernels import BlockMask

BLOCK = 16


class SomeBlocks(vidsparse.RadialProcessor):
    """Radial attention's processor with a mask of random blocks, so that images have something to drop too."""

    keep = 0.4

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        return TokenLayout(grid, text_before, text_after, block_size=BLOCK)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        count = -(-layout.seq_len // BLOCK)
        kept = torch.rand(count, count, generator=torch.Generator().manual_seed(count)) < self.keep
        kept |= torch.eye(count, dtype=torch.bool)
        mask = BlockMask.from_dense(
            kept[None, None],
            seq_len_q=layout.seq_len,
            seq_len_kv=layout.seq_len,
            q_block_size=BLOCK,
            kv_block_size=BLOCK,
        )
        return mask.to(device), None


class AllBlocks(SomeBlocks):
    keep = 1.0


def bind(model: Any, cls: type = SomeBlocks, **options: Any) -> Any:
    processor = cls(**{"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0, **options})
    model.set_attn_processor(processor)
    return processor


def sharpen(model: Any) -> Any:
    """Larger attention weights, and none that are zero, so that what attention does matters for the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and (".to_" in name or "_proj." in name or not parameter.any()):
                spread = 2.0 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


@functools.cache
def built(name: str) -> Any:
    torch.manual_seed(0)
    return sharpen(CASES[name].build()).eval()


def build(name: str) -> Any:
    """A model of the family, the same every time."""
    return copy.deepcopy(built(name))


def run(model: Any, name: str, batch: int = 1) -> torch.Tensor:
    out = model(**CASES[name].inputs(batch, torch.Generator().manual_seed(0)), return_dict=False)[0]
    return torch.stack(list(out)) if isinstance(out, list) else out


@functools.cache
def outputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the stock model and of the sparse one."""
    model = build(name)
    with torch.no_grad():
        stock = run(model, name)
        bind(model)
        sparse = run(model, name)
    differ(sparse, stock)
    return stock, sparse


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pipe:
    """A pipeline of diffusers around the tiny model of a family; prompts come encoded, latents go out.

    Attributes:
        cls: name of the pipeline's class.
        call: arguments that do not change.
        size: height, width and, for videos, number of frames.
        branches: guidance branches by the names of the report.
        larger: another size.
        missing: components that it does without.
    """

    cls: str
    call: Callable[[], dict[str, Any]]
    size: tuple[int, ...]
    larger: tuple[int, ...]
    branches: tuple[str, ...]
    missing: tuple[str, ...] = ("tokenizer", "text_encoder", "vae")
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    extra: dict[str, Any] = field(default_factory=dict)


def prompts(length: int, pooled: bool = False, mask: str = "", **call: Any) -> Callable[[], dict[str, Any]]:
    """A prompt and a negative prompt of `length` tokens, with their pooled form and masks where a family has them."""

    def make() -> dict[str, Any]:
        arguments = {"prompt_embeds": text(1, length, 16), "negative_prompt_embeds": text(1, length, 16, seed=1)}
        if pooled:
            arguments |= {"pooled_prompt_embeds": text(1, 8), "negative_pooled_prompt_embeds": text(1, 8, seed=1)}
        if mask:
            kept = [prefix_mask(1, length, length - cut) for cut in (2, 4)]
            kept = kept if mask == "prompt_attention_mask" and "guidance_scale" in call else [x.bool() for x in kept]
            arguments |= {mask: kept[0], f"negative_{mask}": kept[1]}
        return arguments | call

    return make


TWO_ENCODERS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae")
THREE_ENCODERS = (*TWO_ENCODERS, "tokenizer_3", "text_encoder_3")
PIPELINES = {
    "Wan": Pipe(
        "WanPipeline", prompts(6, guidance_scale=5.0), (96, 112, 17), (112, 128, 17), branches=("cond", "uncond")
    ),
    "HunyuanVideo": Pipe(
        "HunyuanVideoPipeline",
        prompts(11, pooled=True, mask="prompt_attention_mask", true_cfg_scale=3.0),
        (48, 64, 17),
        (64, 80, 17),
        branches=("cond", "uncond"),
        missing=TWO_ENCODERS,
    ),
    "CogVideoX-5B": Pipe(
        "CogVideoXPipeline",
        prompts(7, guidance_scale=5.0),
        (96, 112, 17),
        (112, 128, 17),
        branches=("cond_uncond",),
        scheduler="CogVideoXDDIMScheduler",
    ),
    "Mochi": Pipe(
        "MochiPipeline",
        prompts(11, mask="prompt_attention_mask", guidance_scale=5.0),
        (96, 112, 25),
        (112, 128, 25),
        branches=("cond_uncond",),
    ),
    "LTX-Video": Pipe(
        "LTXPipeline",
        prompts(9, mask="prompt_attention_mask", guidance_scale=3.0),
        (192, 224, 33),
        (224, 256, 33),
        branches=("cond_uncond",),
    ),
    "Flux": Pipe(
        "FluxPipeline",
        prompts(9, pooled=True, true_cfg_scale=3.0),
        (192, 224),
        (224, 256),
        branches=("cond", "uncond"),
        missing=TWO_ENCODERS,
    ),
    "Qwen-Image": Pipe(
        "QwenImagePipeline",
        prompts(9, mask="prompt_embeds_mask", true_cfg_scale=3.0),
        (192, 224),
        (224, 256),
        branches=("cond", "uncond"),
    ),
    "SD3": Pipe(
        "StableDiffusion3Pipeline",
        prompts(9, pooled=True, guidance_scale=5.0),
        (192, 224),
        (224, 256),
        branches=("call 0",),
        missing=THREE_ENCODERS,
    ),
}
COMPILED = tuple(PIPELINES)
"""Pipelines that are compiled as well, which takes ten times as long as the rest."""

VIDEO_SIZES = (96, 112, 17), (112, 128, 17)
IMAGE_SIZES = (192, 224), (224, 256)


def kandinsky_prompts() -> dict[str, Any]:
    prompt: dict[str, Any] = {"guidance_scale": 5.0}
    for seed, (name, length) in enumerate((("", 6), ("negative_", 5))):
        prompt[f"{name}prompt_embeds_qwen"] = text(1, length, 16, seed=seed)
        prompt[f"{name}prompt_embeds_clip"] = text(1, 8, seed=seed)
        prompt[f"{name}prompt_cu_seqlens"] = torch.tensor([0, length], dtype=torch.int32)
    return prompt


def chroma_prompts() -> dict[str, Any]:
    given = prompts(9, mask="prompt_attention_mask", guidance_scale=5.0)()
    return {name: x.bool() if "mask" in name else x for name, x in given.items()}


def z_image_prompts() -> dict[str, Any]:
    return {"prompt_embeds": [text(9, 16)], "negative_prompt_embeds": [text(7, 16, seed=1)], "guidance_scale": 4.0}


def masked(**call: Any) -> Callable[[], dict[str, Any]]:
    return prompts(9, mask="prompt_attention_mask", guidance_scale=4.0, **call)


IMAGE_ENCODER = ("image_encoder", "feature_extractor")
ONE_ENCODER = TWO_ENCODERS[:2] + TWO_ENCODERS[-1:]
PIPELINES |= {
    "SkyReels-V2": Pipe(
        "SkyReelsV2Pipeline",
        prompts(6, guidance_scale=5.0),
        *VIDEO_SIZES,
        branches=("cond", "uncond"),
        scheduler="UniPCMultistepScheduler",
    ),
    "CogVideoX-2B": Pipe(
        "CogVideoXPipeline",
        prompts(7, guidance_scale=5.0),
        *VIDEO_SIZES,
        branches=("cond_uncond",),
        scheduler="CogVideoXDDIMScheduler",
    ),
    "CogVideoX-1.5": Pipe(
        "CogVideoXPipeline",
        prompts(7, guidance_scale=5.0),
        *VIDEO_SIZES,
        branches=("cond_uncond",),
        scheduler="CogVideoXDPMScheduler",
    ),
    "Kandinsky 5": Pipe(
        "Kandinsky5T2VPipeline",
        kandinsky_prompts,
        *VIDEO_SIZES,
        branches=("call 0", "call 1"),
        missing=TWO_ENCODERS,
    ),
    "Flux 2": Pipe(
        "Flux2Pipeline",
        lambda: {"prompt_embeds": text(1, 9, 16), "guidance_scale": 4.0},
        *IMAGE_SIZES,
        branches=("call 0",),
    ),
    "Chroma": Pipe(
        "ChromaPipeline",
        chroma_prompts,
        *IMAGE_SIZES,
        branches=("call 0", "call 1"),
        missing=ONE_ENCODER + IMAGE_ENCODER,
    ),
    "Ovis-Image": Pipe(
        "OvisImagePipeline",
        prompts(9, guidance_scale=4.0, negative_prompt=None),
        *IMAGE_SIZES,
        branches=("cond", "uncond"),
    ),
    "SD3.5": Pipe(
        "StableDiffusion3Pipeline",
        prompts(9, pooled=True, guidance_scale=5.0),
        *IMAGE_SIZES,
        branches=("call 0",),
        missing=THREE_ENCODERS,
    ),
    "Z-Image": Pipe("ZImagePipeline", z_image_prompts, *IMAGE_SIZES, branches=("call 0",)),
    "Lumina 2": Pipe("Lumina2Pipeline", masked(), *IMAGE_SIZES, branches=("call 0", "call 1")),
    "PixArt": Pipe(
        "PixArtSigmaPipeline",
        masked(use_resolution_binning=False, negative_prompt=None),
        *IMAGE_SIZES,
        branches=("call 0",),
        scheduler="DPMSolverMultistepScheduler",
    ),
    "CogView 4": Pipe("CogView4Pipeline", prompts(9, guidance_scale=4.0), *IMAGE_SIZES, branches=("cond", "uncond")),
    "AuraFlow": Pipe("AuraFlowPipeline", masked(), *IMAGE_SIZES, branches=("call 0",)),
}


def pipeline(name: str) -> Any:
    made = PIPELINES[name]
    components = {"transformer": build(name), "scheduler": model_class(made.scheduler)()}
    pipe = model_class(made.cls)(**components, **dict.fromkeys(made.missing))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, size: tuple[int, ...] | None = None, **changes: Any) -> torch.Tensor:
    """Four steps with a fixed seed; latents."""
    made = PIPELINES[name]
    sizes = dict(zip(("height", "width", "num_frames"), size or made.size, strict=False))
    call = {"num_inference_steps": 4, "output_type": "latent", **made.call(), **sizes, **changes}
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.isfinite(want).all() and want.abs().max() > 0
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-3)


def differ(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() > 1e-3 * other.abs().max(), (
        "what is dropped must matter for the test to mean much"
    )


families = pytest.mark.parametrize("name", CASES)
piped = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


@piped
def test_a_pipeline_runs_with_a_bare_processor(name):
    """pipeline"""
    pipe, case = pipeline(name), CASES[name]
    stock = generate(pipe, name)
    processor = bind(pipe.transformer, AllBlocks)
    close(generate(pipe, name), stock)
    assert processor.report().num_sparse_calls == processor.report().num_calls > 0
    processor = bind(pipe.transformer, warmup_steps=1, dense_layers=1)
    differ(generate(pipe, name), stock)
    rows = processor.report().rows
    branches = PIPELINES[name].branches
    assert sorted((r.layer, r.step, r.branch) for r in rows) == [
        (layer, step, branch) for layer in range(case.targets) for step in range(4) for branch in sorted(branches)
    ]
    assert {r.calls for r in rows} == {1}
    for row in rows:
        reason = "warm-up step" if row.step == 0 else "dense layer" if row.layer == 0 else None
        assert row.reason == reason and (row.density == 1.0 if reason else row.density < 0.6)
    assert processor.report().fallbacks == []
    unbind(pipe.transformer)
    assert torch.equal(generate(pipe, name), stock)


@pytest.mark.parametrize("name", COMPILED)
def test_the_whole_model_compiles_to_two_graphs(name):
    """compile (whole)"""
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe, counter = pipeline(name), CompileCounterWithBackend("eager")
    model = pipe.transformer
    processor = bind(model, warmup_steps=1)
    want, rows = generate(pipe, name), processor.report().rows
    model.compile(fullgraph=True, backend=counter)
    close(generate(pipe, name), want)
    assert processor.report().rows == rows
    assert counter.frame_count == 2, "one for dense steps and one for sparse ones, whatever the step or layer"
    with torch._dynamo.config.patch(error_on_recompile=True):
        generate(pipe, name, num_inference_steps=6)
    unbind(model)
    assert not {"compile", "cache_context", "fuse_qkv_projections"}.intersection(vars(model))


@pytest.mark.parametrize("name", [name for name in COMPILED if CASES[name].regional])
def test_repeated_blocks_compile_to_two_graphs_a_class(name):
    """compile (blocks)"""
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe, counter = pipeline(name), CompileCounterWithBackend("eager")
    model = pipe.transformer
    processor = bind(model, warmup_steps=1)
    want, rows = generate(pipe, name), processor.report().rows
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    close(generate(pipe, name), want)
    assert processor.report().rows == rows
    classes = {type(m).__name__ for m in model.modules()}.intersection(model._repeated_blocks)
    assert 2 <= counter.frame_count <= 2 * len(classes)
    with torch._dynamo.config.patch(error_on_recompile=True):
        generate(pipe, name, num_inference_steps=6)


@pytest.mark.parametrize("name", ["Wan"])
def test_another_resolution_compiles_as_often_as_the_stock_model(name):
    """compile (resolution)"""
    from torch._dynamo.testing import CompileCounterWithBackend

    counts, sizes = [], (PIPELINES[name].size, PIPELINES[name].larger)
    for sparse in (False, True):
        torch._dynamo.reset()
        pipe, counter = pipeline(name), CompileCounterWithBackend("eager")
        processor = bind(pipe.transformer, warmup_steps=1) if sparse else None
        want = [generate(pipe, name, size=size, num_inference_steps=2) for size in sizes]
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        for size, each in zip(sizes, want, strict=True):
            close(generate(pipe, name, size=size, num_inference_steps=2), each)
        assert processor is None or processor.report().num_sparse_calls > 0
        counts.append(counter.frame_count)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in sizes:
                generate(pipe, name, size=size, num_inference_steps=3)
    stock, ours = counts
    assert ours == 2 * stock, "the stock model's graphs, once for dense steps and once for sparse ones"


@torch.no_grad()
@pytest.mark.parametrize("order", ["compile first", "removed and set again"])
def test_compiling_and_binding_in_any_order(order):
    """compile (whole)"""
    name = "Wan"
    model = build(name)
    stock = run(model, name)
    options = {"block_size": 16, "decay_factor": 0.2, "warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}
    handle = vidsparse.apply(model, "radial", **options)
    want = run(model, name)
    differ(want, stock)
    if order == "compile first":
        handle.remove()
        model.compile(fullgraph=True, backend="eager")
        close(run(model, name), stock)
        handle = vidsparse.apply(model, handle.recipe)
    else:
        model.compile(fullgraph=True, backend="eager")
        close(run(model, name), want)
        handle.remove()
        close(run(model, name), stock)
        handle = vidsparse.apply(model, handle.recipe)
    close(run(model, name), want)
    assert handle.report().num_sparse_calls == 2
    handle.remove()
    close(run(model, name), stock)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        pytest.param("Wan", True, id="Wan"),
        pytest.param("Flux", False, id="Flux"),
    ],
)
def test_checkpointing_under_compile(name, whole):
    """checkpointing"""
    model = build(name).train()
    processor = bind(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(model, name).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    model.enable_gradient_checkpointing()
    if whole:
        model.compile(backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    got = gradients()
    assert got.keys() == want.keys() and any(n.endswith("to_q.weight") and g.any() for n, g in want.items())
    for n, gradient in want.items():
        torch.testing.assert_close(got[n], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, rtol=1e-3)
    assert processor.report().fallbacks == []


def offload(model: Any, how: str) -> None:
    device = torch.device("cpu")
    if how == "model":
        from accelerate import cpu_offload_with_hook

        cpu_offload_with_hook(model, execution_device=device)
    elif how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=device)
    else:
        kind = {"offload_type": "block_level", "num_blocks_per_group": 1} if how == "group (blocks)" else {}
        model.enable_group_offload(device, device, **{"offload_type": "leaf_level", **kind})


@torch.no_grad()
@families
@pytest.mark.parametrize("how", ["model", "sequential", "group (leaves)", "group (blocks)"])
def test_offload(name, how):
    """offload"""
    stock, want = outputs(name)
    try:
        model = build(name)
        offload(model, how)
        assert torch.equal(run(model, name), stock)
    except Exception as error:
        pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}"[:200])
    processor = bind(model)
    assert torch.equal(run(model, name), want)
    unbind(model)
    assert torch.equal(run(model, name), stock)
    model = build(name)
    processor = bind(model)
    offload(model, how)
    assert torch.equal(run(model, name), want)
    assert processor.report().num_sparse_calls == CASES[name].targets
    unbind(model)
    assert torch.equal(run(model, name), stock)


@torch.no_grad()
@families
def test_layerwise_casting(name):
    """layerwise casting"""

    def cast(model: Any) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    stock, plain = build(name), outputs(name)[0]
    cast(stock)
    want = run(stock, name)
    for bind_first in (True, False):
        model = build(name)
        if not bind_first:
            cast(model)
        processor = bind(model, AllBlocks)
        if bind_first:
            cast(model)
        assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}
        close(run(model, name), want)
        assert processor.report().num_sparse_calls == CASES[name].targets
        unbind(model)
        assert torch.equal(run(model, name), want)
    differ(want, plain)


def adapter(**changes: Any) -> Any:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "to_query", "to_key", "to_value"]
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False, **changes})


def add_lora(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(adapter())


def lora_gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(model, name).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None and p.grad.any()}


@families
def test_lora(name):
    """LoRA"""
    stock = build(name)
    plain = run(stock, name).detach()
    try:
        add_lora(stock)
        stock.fuse_lora()
        stock.unfuse_lora()
    except Exception as error:
        pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}"[:200])
    want, gradients = run(stock, name).detach(), lora_gradients(stock, name)
    differ(want, plain)
    for bind_first in (True, False):
        model = build(name)
        if not bind_first:
            add_lora(model)
        processor = bind(model, AllBlocks)
        if bind_first:
            add_lora(model)
        close(run(model, name).detach(), want)
        assert processor.report().num_sparse_calls == CASES[name].targets
        got = lora_gradients(model, name)
        assert got.keys() == gradients.keys() and any("to_q" in n for n in got)
        bind(model)
        assert any(not torch.allclose(g, gradients[n], rtol=0.1) for n, g in lora_gradients(model, name).items())
        bind(model, AllBlocks)
        with torch.no_grad():
            model.fuse_lora()
            close(run(model, name), want)
            model.unfuse_lora()
            close(run(model, name), want)
            model.delete_adapters("default")
            close(run(model, name), plain)
            unbind(model)
            close(run(model, name), plain)


@torch.no_grad()
@piped
def test_lora_loaded_by_the_pipeline(name, tmp_path):
    """LoRA"""
    from peft.utils import get_peft_model_state_dict

    source = pipeline(name)
    if not hasattr(source, "load_lora_weights"):
        pytest.skip("diffusers loads no LoRA into this pipeline")
    add_lora(source.transformer)
    metadata = {"transformer_lora_adapter_metadata": adapter().to_dict()}
    source.save_lora_weights(tmp_path, get_peft_model_state_dict(source.transformer), **metadata)
    want = generate(source, name)
    pipe = pipeline(name)
    plain = generate(pipe, name)
    differ(want, plain)
    processor = bind(pipe.transformer, AllBlocks)
    pipe.load_lora_weights(tmp_path)
    close(generate(pipe, name), want)
    pipe.fuse_lora(components=["transformer"])
    close(generate(pipe, name), want)
    pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    close(generate(pipe, name), plain)
    assert processor.report().num_sparse_calls == processor.report().num_calls > 0
    unbind(pipe.transformer)
    close(generate(pipe, name), plain)


@torch.no_grad()
@families
def test_fused_projections(name):
    """fused projections"""
    if not hasattr(build(name), "fuse_qkv_projections"):
        pytest.skip("the model has no fused projections")
    model = build(name)
    stock = run(model, name)
    try:
        model.fuse_qkv_projections()
        close(run(model, name), stock)
        model.unfuse_qkv_projections()
    except Exception as error:
        pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}"[:200])
    bind(model)
    want = run(model, name)
    differ(want, stock)
    model.fuse_qkv_projections()
    close(run(model, name), want)
    model.unfuse_qkv_projections()
    close(run(model, name), want)
    unbind(model)
    close(run(model, name), stock)
    model.fuse_qkv_projections()
    processor = bind(model)
    close(run(model, name), want)
    assert processor.report().num_sparse_calls == CASES[name].targets
    unbind(model)
    close(run(model, name), stock)


CACHES = ("FirstBlockCache", "PyramidAttentionBroadcast", "FasterCache", "MagCache", "TaylorSeer")


def cache_config(cache: str, pipe: Any, batched: bool) -> Any:
    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    if cache == "FirstBlockCache":
        return model_class("FirstBlockCacheConfig")(threshold=0.5)
    if cache == "PyramidAttentionBroadcast":
        return model_class("PyramidAttentionBroadcastConfig")(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001), **now
        )
    if cache == "FasterCache":
        return model_class("FasterCacheConfig")(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=2,
            is_guidance_distilled=not batched,
            tensor_format="BFCHW" if "CogVideoX" in type(pipe).__name__ else "BCFHW",
            attention_weight_callback=lambda module: 0.3,
            **now,
        )
    if cache == "MagCache":
        return model_class("MagCacheConfig")(
            mag_ratios=torch.linspace(1.0, 0.9, 6), num_inference_steps=6, threshold=0.5, retention_ratio=0.2
        )
    return model_class("TaylorSeerCacheConfig")(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r".*blocks\.\d+\.(attn1?|self_attention)"]
    )


@pytest.mark.parametrize("cache", CACHES)
@piped
def test_caches(name, cache):
    """caches"""
    if not hasattr(build(name), "enable_cache"):
        pytest.skip("diffusers has no caches for the model")

    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(cache_config(cache, pipe, PIPELINES[name].branches == ("cond_uncond",)))

    def make(pipe: Any) -> torch.Tensor:
        return generate(pipe, name, num_inference_steps=6)

    pipe = pipeline(name)
    plain = make(pipe)
    try:
        enable(pipe)
        want = make(pipe)
    except Exception as error:
        pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}"[:200])
    assert not torch.equal(want, plain), "the cache must skip something"
    for bind_first in (True, False):
        pipe = pipeline(name)
        if not bind_first:
            enable(pipe)
        processor = bind(pipe.transformer, AllBlocks)
        if bind_first:
            enable(pipe)
        close(make(pipe), want)
        report, steps = processor.report(), 6 * len(PIPELINES[name].branches)
        assert 0 < report.num_sparse_calls == report.num_calls < CASES[name].targets * steps
        assert {row.step for row in report.rows} <= set(range(6))
    unbind(pipe.transformer)
    assert torch.equal(make(pipe), want)
    pipe.transformer.disable_cache()
    assert torch.equal(make(pipe), plain)


ONE_BLOCK = ("HunyuanVideo", "Flux 2", "Chroma", "Ovis-Image", "AuraFlow")


@piped
def test_cache_dit(name):
    """cache-dit"""
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")

    def enable(pipe: Any) -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=2,
            residual_diff_threshold=10.0,
            max_continuous_cached_steps=1,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    def make(pipe: Any) -> torch.Tensor:
        return generate(pipe, name, num_inference_steps=6)

    pipe = pipeline(name)
    plain = make(pipe)
    try:
        enable(pipe)
        want = make(pipe)
    except Exception as error:
        pytest.skip(f"the stock model cannot: {type(error).__name__}: {error}"[:200])
    assert torch.equal(want, plain) == (name in ONE_BLOCK), "the cache must skip something"
    if name in ONE_BLOCK:
        pytest.skip("one block of each kind here, and the first is always computed")
    for bind_first in (True, False):
        pipe = pipeline(name)
        if not bind_first:
            enable(pipe)
        processor = bind(pipe.transformer, AllBlocks)
        if bind_first:
            enable(pipe)
        close(make(pipe), want)
        report, most = processor.report(), CASES[name].targets * 6 * len(PIPELINES[name].branches)
        assert 0 < report.num_sparse_calls == report.num_calls < most


@torch.no_grad()
@families
def test_quantised_linears(name):
    """torchao"""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantise(model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    stock = build(name)
    plain = run(stock, name)
    quantise(stock)
    want = run(stock, name)
    assert not torch.equal(want, plain)
    for bind_first in (True, False):
        model = build(name)
        if not bind_first:
            quantise(model)
        processor = bind(model, AllBlocks)
        if bind_first:
            quantise(model)
        close(run(model, name), want)
        assert processor.report().num_sparse_calls == CASES[name].targets
        unbind(model)
        assert torch.equal(run(model, name), want)


def test_vae_tiling(build_pipeline):
    """VAE tiling"""
    pipe = build_pipeline()
    call = {"prompt": "a red ball", "num_inference_steps": 2, "height": 64, "width": 64, "num_frames": 5}

    def make() -> torch.Tensor:
        return pipe(**call, max_sequence_length=16, output_type="pt", generator=torch.Generator().manual_seed(0))[0]

    pipe.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    stock = make()
    processor = bind(pipe.transformer, AllBlocks)
    torch.testing.assert_close(make(), stock, atol=1e-4, rtol=1e-3)
    assert processor.report().num_sparse_calls == 3 * 2 * 2
    assert stock.shape == (1, 5, 3, 64, 64)


DISPATCHED = ("Wan", "HunyuanVideo", "HunyuanVideo-1.5", "LTX-Video", "Flux", "Qwen-Image")


@torch.no_grad()
@pytest.mark.parametrize("name", DISPATCHED)
def test_dense_calls_stay_on_the_chosen_backend(name, monkeypatch):
    """attention backend"""
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    chosen = attention_dispatch.AttentionBackendName("_native_math")
    plain, seen = registry._backends[chosen], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("query", "key"), args, strict=False)) | kwargs
        if given["query"].shape[1] == given["key"].shape[1]:
            seen.append(given["query"].shape[1])
        return plain(*args, **kwargs)

    monkeypatch.setitem(registry._backends, chosen, watched)
    model = build(name)
    grid = CASES[name].grid
    tokens = grid[0] * grid[1] * grid[2] + sum(CASES[name].text[0])
    stock = run(model, name)
    assert seen == []
    with attention_dispatch.attention_backend("_native_math"):
        close(run(model, name), stock)
        stock_calls = seen.count(tokens)
        assert stock_calls == CASES[name].targets
        seen.clear()
        bind(model, dense_layers=1)
        run(model, name)
        assert seen.count(tokens) == 1, "the one dense layer"
    seen.clear()
    want = run(model, name)
    assert seen == []
    model.set_attention_backend("_native_math")
    try:
        close(run(model, name), want)
        assert seen.count(tokens) == 1
    finally:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    unbind(model)
    seen.clear()
    run(model, name)
    assert seen.count(tokens) == CASES[name].targets, "the choice stays when the processor goes"


@torch.no_grad()
@families
def test_skipped_attention_scores_run_dense(name):
    """guiders"""
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook

    def skip(model: Any, first: str) -> Any:
        registry = HookRegistry.check_if_exists_or_initialize(model.get_submodule(first))
        registry.register_hook(AttentionProcessorSkipHook(lambda *args: None, skip_attention_scores=True), "skip")
        return registry

    model = build(name)
    plain = run(model, name)
    own = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    processor = bind(model, AllBlocks)
    first = next(path for path in own if model.get_submodule(path).processor is not own[path])
    targets = CASES[name].targets
    run(model, name)
    assert processor.report().num_sparse_calls == targets
    stock = build(name)
    skip(stock, first)
    want = run(stock, name)
    differ(want, plain)
    registry = skip(model, first)
    close(run(model, name), want)
    report = processor.report()
    assert report.dense_calls == {"attention scores skipped by perturbed-attention guidance": 1}
    assert report.num_sparse_calls == 2 * targets - 1 and len(report.fallbacks) == 1
    registry.remove_hook("skip", recurse=False)
    close(run(model, name), plain)
    bind(model, AllBlocks, strict=True)
    skip(model, first)
    with pytest.raises(DenseFallbackError, match=rf"{first} would run dense .*attention scores skipped"):
        run(model, name)


@torch.no_grad()
@pytest.mark.parametrize("bind_first", [True, False], ids=["set before", "set after"])
def test_layer_skip(bind_first):
    """guiders"""
    from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip

    # The only family of ours whose processor diffusers' registry knows; elsewhere the stock model refuses as well.
    name = "Qwen-Image"

    def skip(model: Any) -> None:
        apply_layer_skip(model, LayerSkipConfig([0], skip_attention=False, skip_attention_scores=True, skip_ff=False))

    stock = build(name)
    plain = run(stock, name)
    skip(stock)
    want = run(stock, name)
    differ(want, plain)
    model = build(name)
    if not bind_first:
        skip(model)
    processor = bind(model, AllBlocks)
    if bind_first:
        skip(model)
    close(run(model, name), want)
    assert (processor.report().num_sparse_calls, processor.report().num_calls) == (1, 2)


@torch.no_grad()
@families
def test_copies_and_pickles(name):
    """copy and pickle"""
    stock, want = outputs(name)
    model = build(name)
    bind(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for parameter in model.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(run(twin, name), want)
        if name == "Wan":
            twin.compile(backend="eager")
            close(run(twin, name), want)
        again = copy.deepcopy(twin)
        close(run(again, name), want)
        unbind(again)
        assert torch.equal(run(again, name), stock)


@piped
def test_two_threads(name):
    """threads"""
    pipes = [pipeline(name) for _ in range(2)]
    steps = (4, 5)
    processors = [bind(pipe.transformer, warmup_steps=index) for index, pipe in enumerate(pipes)]
    want = [generate(pipe, name, num_inference_steps=n) for pipe, n in zip(pipes, steps, strict=True)]
    got: list[Any] = [None, None]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(3):
            got[index] = generate(pipes[index], name, num_inference_steps=steps[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert got[index] is not None and torch.equal(got[index], want[index])
        rows = processors[index].report().rows
        assert {row.step for row in rows} == set(range(steps[index])) and {row.calls for row in rows} == {1}
        assert {row.step for row in rows if row.reason} == set(range(index))
